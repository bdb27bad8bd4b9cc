"""What is added to the paper's recipe, and the paper's ablations, on the tiny family: every row of `methods.py` and
`rows.py` trained, scored, set beside its base.

    python -m tools.ablations --quick
    python -m tools.ablations --jobs 2 --only curve max-time
    python -m tools.ablations distill.steps=200

Runs lie in runs/ablations/, each in a folder named by its recipe's hash, and several rows may share one. What has a
result.json is done; the same command goes on with the rest, inside a run too. To repeat a run delete its folder. A
run scored with another reader or feature network is scored anew; one made with other settings has to be deleted
first.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from sprint.base.errors import SprintError
from sprint.base.progress import BAR, QUIET_INTERVAL
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Data, DataKind
from tools.ablations.estimate import estimate
from tools.ablations.jobs import (
    CACHED,
    INTERRUPTED,
    ROOT,
    RUNS,
    Job,
    Settings,
    is_done,
    plan,
    recipe_file,
    steps_done,
)
from tools.ablations.methods import GROUPS, chosen
from tools.ablations.rows import Group

WORKER_LOG = "worker.log"
POLL = 0.5  # seconds between looks at the workers


def prepare(settings: Settings, cached: bool) -> None:
    """The cache that rows of the paper read, if there are any, and the statistics of real scenes, where they are not
    there yet."""
    from sprint.data.cache.items import CACHE
    from sprint.data.encode.make import make_cache
    from tools.ablations.run import real_statistics

    if cached and not (settings.cache_folder / CACHE).exists():
        recipe = load_recipe(recipe_file(CACHED), [f"data.path={settings.cache_folder}", *settings.overrides])
        data = Data(DataKind.scenes, size=recipe.data.size, seed=recipe.data.seed)
        text = make_cache(
            replace(recipe, data=data), settings.cache_folder, settings.cache_samples, dtype="fp32"
        )
        print(text, file=sys.stderr)
    real_statistics(settings.root)


class Workers:
    """Processes of one thread that take jobs from a list, each once its teacher is there.

    command   starts a worker; a job's key is put after it
    """

    def __init__(self, jobs: dict[str, Job], root: Path, at_once: int, command: Sequence[str]):
        self.jobs, self.root, self.at_once, self.command = jobs, root, at_once, command
        self.done = {key for key, job in jobs.items() if is_done(job, root)}
        self.waiting = [job for job in jobs.values() if job.key not in self.done]
        self.running: dict[subprocess.Popen, Job] = {}
        self.troubles: dict[str, str] = {}  # by key, the line with which a worker ended

    def run(self) -> dict[str, str]:
        """All jobs.  -> troubles by key.  Ctrl-C and SIGTERM stop the workers, which save, and go on upwards as
        KeyboardInterrupt."""
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with self._bar() as bar:
                while self._start() or self.running:
                    time.sleep(POLL)
                    self._collect()
                    self._show(bar)
        finally:
            self._stop()
            signal.signal(signal.SIGTERM, previous)
        return self.troubles

    def _start(self) -> bool:
        """Fill the free places.  -> whether a job was started"""
        started = False
        for job in [*self.waiting]:
            if len(self.running) >= self.at_once:
                break
            if job.teacher in self.troubles:
                self.troubles[job.key] = f"its teacher is not there: {self.troubles[job.teacher]}"
                self.waiting.remove(job)
            elif not job.teacher or job.teacher in self.done:
                self.waiting.remove(job)
                self.running[self._process(job)] = job
                started = True
        return started

    def _process(self, job: Job) -> subprocess.Popen:
        folder = self.root / job.key
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / WORKER_LOG, "a", encoding="utf-8") as log:
            return subprocess.Popen(
                [*self.command, job.key],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                start_new_session=True,  # a terminal's Ctrl-C is for this process alone, which tells them
            )

    def _collect(self) -> None:
        for process, job in [*self.running.items()]:
            if process.poll() is not None:
                del self.running[process]
                if is_done(job, self.root):
                    self.done.add(job.key)
                else:
                    said = (self.root / job.key / WORKER_LOG).read_text(encoding="utf-8", errors="replace")
                    line = (said.strip().splitlines() or ["said nothing"])[-1]
                    self.troubles[job.key] = f"{line} (exit code {process.returncode})"

    def _stop(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait()

    def _bar(self) -> tqdm:
        return tqdm(
            desc="ablations",
            total=sum(job.steps for job in self.jobs.values()),
            initial=self._steps(),
            bar_format=BAR,
            file=sys.stderr,
            mininterval=0.2 if sys.stderr.isatty() else QUIET_INTERVAL,
        )

    def _show(self, bar: tqdm) -> None:
        bar.set_description_str(f"ablations, {len(self.done)} of {len(self.jobs)} runs", refresh=False)
        bar.update(self._steps() - bar.n)

    def _steps(self) -> int:
        """What is done is done whole, also where the run stopped early."""
        return sum(
            job.steps if job.key in self.done else steps_done(job, self.root) for job in self.jobs.values()
        )


def default_jobs() -> int:
    import torch

    if torch.cuda.is_available():
        return 1
    mine = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(mine(0)) if mine else os.cpu_count() or 1


def run_list(
    groups: Sequence[Group], settings: Settings, at_once: int, arguments: Sequence[str]
) -> dict[str, str]:
    """Everything that is missing.  -> troubles by key. Raises SprintError where nothing can begin."""
    jobs = plan(groups, settings)
    print(f"ablations: {estimate(jobs, settings.root, at_once)}", file=sys.stderr)
    prepare(settings, any(row.recipe == CACHED for group in groups for row in group.rows))
    command = [sys.executable, "-m", "tools.ablations", *arguments, "--work"]
    return Workers(jobs, settings.root, at_once, command).run()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipes, for all rows")
    parser.add_argument("--quick", action="store_true", help="1 seed, 160 steps, 60 prompts")
    parser.add_argument(
        "--jobs", type=int, help="runs at once, a thread each (default: CPU cores; 1 on a GPU)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="GROUP", choices=[group.key for group in GROUPS], help="some groups"
    )
    parser.add_argument("--runs", type=Path, default=RUNS, help=f"where runs are kept (default {RUNS})")
    parser.add_argument(
        "--out",
        type=Path,
        help="where results go (default: tools/results once the whole list is done, else the runs' folder)",
    )
    parser.add_argument("--page", action="store_true", help="run nothing; write what has been found so far")
    parser.add_argument("--work", metavar="KEY", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.jobs is not None and args.jobs < 1:
        print(f"ablations: --jobs {args.jobs}: give at least 1", file=sys.stderr)
        return 2
    groups, jobs = chosen(args.only or ()), args.jobs or default_jobs()
    partial = args.quick or args.only or args.overrides
    page_folder = args.runs / ("quick" if args.quick else "part") if partial else args.runs
    try:
        settings = Settings(args.quick, tuple(args.overrides), args.runs)
        planned = plan(groups, settings)
        if args.work:
            from tools.ablations.run import work

            job = planned.get(args.work)
            if job is None:
                raise SprintError(
                    f"{args.work}: no such run; the list has changed since it was begun: start again"
                )
            return work(job, settings.root)
        passed_on = [*args.overrides, "--runs", str(args.runs), *(["--quick"] if args.quick else [])]
        troubles = {} if args.page else run_list(groups, settings, jobs, passed_on)
    except SprintError as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ablations: stopped; what was done is kept, the same command goes on", file=sys.stderr)
        return INTERRUPTED
    for key, line in troubles.items():
        print(f"ablations: {key}: {line}; see {args.runs / key / WORKER_LOG}", file=sys.stderr)
    from tools.ablations.page import write_results

    whole = not partial and all(is_done(job, settings.root) for job in planned.values())
    out = args.out or (ROOT / "tools" / "results" if whole else page_folder)
    write_results(groups, settings, jobs, out, page_folder)
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
