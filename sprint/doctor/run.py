"""A run: did its weights move, how did training go, and what came of it?"""

from pathlib import Path

from sprint.base.door import parse_json, read_text, shown
from sprint.base.errors import SprintError
from sprint.doctor.curves import examine_curves, updates
from sprint.doctor.findings import Finding, note, ok, refused, wrong
from sprint.doctor.model import examine_model, examine_movement
from sprint.doctor.movement import movement
from sprint.doctor.weights import Tally, compare, names_of, tally, weights_in, weights_of
from sprint.engine.checkpoint import MANIFEST, read_facts
from sprint.evaluate.models import OF_A_RUN, STUDENT, TEACHER
from sprint.evaluate.result import FILE as RESULT_FILE
from sprint.evaluate.result import read_result
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Recipe
from sprint.train.adapt import AdaptStage
from sprint.train.distill import DistillStage
from sprint.train.log import METRICS, read_metrics
from sprint.weights.checkpoint import Checkpoint, understand

RECIPE_FILE, BAD_FILE = "recipe.yaml", "bad_samples.jsonl"
PUBLISHED = "0.6b"  # the recipe with the published settings, to compare what was seen
SMALL_BATCH = 32  # below it gradients are mostly noise; the paper's is 512
STALE_AVERAGE = 0.05  # share of the start that may still be in an average
IN_TRAINING = "student.weights.student.view.network."
AVERAGE = "ema.student.view.network."


def examine_run(folder: Path, against: str | None = None) -> list[Finding]:
    """against   a teacher to compare with, in place of the run's own

    Raises SprintError where there is no such folder.
    """
    if not folder.is_dir():
        raise SprintError(f"{shown(folder)}: no such folder; give a run's, such as runs/tiny")
    recipe, findings = _recipe(folder)
    try:
        rows = read_metrics(folder / METRICS)
    except SprintError as error:
        rows, findings = [], [*findings, refused("log", error)]
    findings += _state(folder, rows, recipe)
    if recipe:
        findings += _seen(rows, recipe) + _average(rows, recipe)
    findings += examine_curves(rows, recipe)
    teacher = against or (str(folder / TEACHER) if (folder / TEACHER).is_dir() else None)
    if (folder / STUDENT).is_dir():
        findings += examine_model(str(folder / STUDENT))
        findings += _moved(folder, teacher)
    else:
        findings += _checkpoints(folder, teacher)
    return findings + _bad_samples(folder) + _evaluation(folder)


# ---- where it stands ----------------------------------------------------------------------------------


def _recipe(folder: Path) -> tuple[Recipe | None, list[Finding]]:
    file = folder / RECIPE_FILE
    if not file.is_file():
        return None, [note("recipe", f"no {RECIPE_FILE}", "the same `sprint distill` command writes it")]
    try:
        return load_recipe(file), []
    except SprintError as error:
        return None, [refused("recipe", error)]


def _state(folder: Path, rows: list[dict], recipe: Recipe | None) -> list[Finding]:
    again = "the same `sprint distill` command goes on from its newest checkpoint"
    if (folder / STUDENT).is_dir():
        return [ok("state", "finished: its student is there")]
    if not rows:
        return [note("state", "nothing was logged yet", again)]
    stage, step = rows[-1]["stage"], rows[-1]["step"]
    total = f" of {getattr(recipe, stage).steps}" if recipe and hasattr(recipe, stage) else ""
    return [note("state", f"no student yet: its last line is of {stage}, step {step}{total}", again)]


def _seen(rows: list[dict], recipe: Recipe) -> list[Finding]:
    """How much the student has learned from, beside the published run."""
    distill, done = recipe.distill, updates(rows, "G")
    if not done:
        return []
    published, states = load_recipe(PUBLISHED).distill, distill.trajectories.states
    kind = f"states of {distill.batch_size // states} trajectories" if states else "pictures"
    text = (
        f"{done:,} updates of {distill.batch_size} {kind}, {done * distill.batch_size:,} in all (published: "
        f"{published.steps // 2:,} of {published.batch_size})"
    )
    if distill.batch_size < SMALL_BATCH:
        return [
            note(
                "seen",
                text,
                f"gradients of so few pictures are mostly noise: at least {SMALL_BATCH}, by micro_batch_size if "
                "memory is short",
            )
        ]
    return [ok("seen", text)]


def _average(rows: list[dict], recipe: Recipe) -> list[Finding]:
    """What is exported is the average of the weights, in which the start counts decay^updates."""
    decay, done = recipe.distill.ema_decay, updates(rows, "G")
    if not decay or not done:
        return []
    left = decay**done
    text = f"decay {decay:g} over {done} updates: the start counts {left:.1%} in what is exported"
    if left > STALE_AVERAGE:
        cure = f"set distill.ema_decay to at most {STALE_AVERAGE ** (1 / done):.4f}, or 0; or train longer"
        return [wrong("average", text, cure)]
    return [ok("average", text)]


# ---- weights ------------------------------------------------------------------------------------------


def _moved(folder: Path, teacher: str | None) -> list[Finding]:
    if teacher is None:
        text = f"no {TEACHER}/ beside the student, so nobody can tell whether it moved"
        return [note("movement", text, "name the teacher that it started from: --against TEACHER")]
    try:
        student = understand(folder / STUDENT)
    except SprintError:
        return []  # said already
    return examine_movement(student, teacher, _called(folder, teacher))


def _called(folder: Path, teacher: str) -> str:
    return "the adapted teacher" if teacher == str(folder / TEACHER) else teacher


def _checkpoints(folder: Path, teacher: str | None) -> list[Finding]:
    """Of a run without a student, what its newest checkpoint of stage 2 holds."""
    places = {stage.name: folder / "checkpoints" / stage.name for stage in (AdaptStage, DistillStage)}
    found = {
        stage: sorted(file.parent for file in place.glob(f"[0-9]*/{MANIFEST}"))
        for stage, place in places.items()
    }
    if not any(found.values()):
        return [note("checkpoints", "none", "save_every is the number of updates between two")]
    if not found[DistillStage.name]:
        return [ok("checkpoints", f"{found[AdaptStage.name][-1].name} is the newest")]
    newest = found[DistillStage.name][-1]
    try:
        facts = read_facts(newest)
        findings = [
            ok("checkpoints", f"{newest.name} is the newest: {facts.get('generator_updates')} updates")
        ]
        if teacher is None:
            return findings
        return findings + _in_training(newest, understand(teacher), _called(folder, teacher))
    except SprintError as error:
        return [refused("checkpoints", error)]


def _in_training(checkpoint: Path, teacher: Checkpoint, called: str) -> list[Finding]:
    keys, findings = teacher.family.keys, []
    for prefix, what in ((IN_TRAINING, "the student"), (AVERAGE, "its average")):
        weights = weights_in(checkpoint, keys, prefix)
        if weights:
            findings += _broken(tally(weights), what)
            findings += movement(compare(weights, weights_of(teacher), keys), called, what)
    return findings


def _broken(counted: Tally, what: str) -> list[Finding]:
    if not counted.broken:
        return []
    return [
        wrong(
            "weights",
            f"{what} in the newest checkpoint is not finite: {names_of(counted.broken)}",
            "delete that checkpoint and go on from the one before, with a lower learning rate",
        )
    ]


# ---- what came of it ----------------------------------------------------------------------------------


def _bad_samples(folder: Path) -> list[Finding]:
    file = folder / BAD_FILE
    if not file.is_file():
        return []
    counts: dict[str, int] = {}
    try:
        for line in read_text(file).splitlines():
            reason = str(parse_json(line, file)["reason"])
            counts[reason] = counts.get(reason, 0) + 1
    except (SprintError, TypeError, KeyError):
        return [note("data", f"{file} cannot be read", "delete it; it is written anew")]
    said = ", ".join(
        f"{count} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1])
    )
    return [note("data", f"passed over {said}", f"{file} lists them; sprint doctor DATA looks at all")]


def _evaluation(folder: Path) -> list[Finding]:
    file = folder / OF_A_RUN / RESULT_FILE
    if not file.is_file():
        return [note("evaluation", "none", f"sprint evaluate {folder}")]
    try:
        read_result(folder / OF_A_RUN)
    except SprintError as error:
        return [refused("evaluation", error, f"delete it and run sprint evaluate {folder}")]
    return [ok("evaluation", f"{file} is there")]
