"""`sprint search-steps`: better times for 2 to 4 steps."""

import argparse
from pathlib import Path

from sprint.cli.shared import add_verb, check_guidance, check_out, numbers, place, quiet_libraries

SEARCH_STEPS = """\
Search the times at which a student takes its 2, 3 or 4 steps, one after the other, on held-out scenes that
no report scores. The best list meets the default one on fresh prompts, and is used only if it is better there by
more than two standard errors of the difference, with the same captions and noise for both lists. The first time
stays as it is. Interrupted, the same command goes on where it stopped.

  sprint search-steps runs/tiny/student                         2, 3 and 4 steps, by the scene score
  sprint search-steps runs/tiny/student --steps 2 --prompts 600
  sprint search-steps runs/tiny/student --objective fid         by FID, with the features of the scene network
  sprint search-steps runs/tiny/student --adopt                 the student's own lists from now on
"""


def add_search_steps(verbs: argparse._SubParsersAction) -> None:
    verb = add_verb(verbs, "search-steps", "find better times for a student's 2 to 4 steps", SEARCH_STEPS)
    verb.add_argument("student", help="a student's or a run's folder, or a hub id")
    verb.add_argument("--steps", default="2,3,4", help="numbers of steps (default 2,3,4)")
    verb.add_argument(
        "--objective",
        choices=("scenes", "fid"),
        default="scenes",
        help="what lists are judged by (default scenes)",
    )
    verb.add_argument(
        "--prompts",
        type=int,
        default=300,
        metavar="N",
        help="to choose on, and as many to confirm (default 300)",
    )
    verb.add_argument(
        "--grid", default="0.2,0.1,0.05", help="spacings in radians, coarse to fine (default 0.2,0.1,0.05)"
    )
    verb.add_argument("--guidance", type=float, default=4.5, help="guidance scale (default 4.5)")
    verb.add_argument(
        "--out", type=place, help="folder of the result (default: search-steps beside the student)"
    )
    verb.add_argument("--adopt", action="store_true", help="write what won into the student's folder")
    verb.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one)")
    verb.set_defaults(verb=search_steps)


def search_steps(args: argparse.Namespace) -> None:
    check_guidance(args.guidance)
    quiet_libraries()
    from sprint.base.place import usable_device
    from sprint.evaluate.search.adopt import adopt, check_adoptable
    from sprint.evaluate.search.lists import BATCH, Search
    from sprint.evaluate.search.steps import search_steps as run
    from sprint.evaluate.search.table import table
    from sprint.weights.card import show_times
    from sprint.weights.folder import student_of

    student = student_of(args.student)
    search = Search(
        student,
        steps=tuple(numbers("--steps", args.steps, int)),
        objective=args.objective,
        prompts=args.prompts,
        grid=tuple(numbers("--grid", args.grid, float)),
        guidance=args.guidance,
    )
    if args.adopt:
        check_adoptable(student)
    beside = Path(student).parent if Path(student).is_dir() else Path()
    out = args.out or beside / "search-steps"
    check_out("--out", out)
    print(f"at most {search.calls} network calls, each of up to {BATCH} pictures")
    found = run(search, out, usable_device(args.device))
    print(table(found))
    print(out / "search.json")
    if args.adopt:
        print(f"adopted: {adopt(student, found)}")
    elif any(row.holds for row in found.values()):
        lists = (f"--times {show_times(row.times)}" for row in found.values() if row.holds)
        print(f"sprint sample {student} {' or '.join(lists)}; --adopt makes them the student's own")
