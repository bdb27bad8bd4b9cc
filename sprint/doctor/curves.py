"""What the lines of a metrics.jsonl (`sprint.train.log`) say of a run: skipped updates, norms, losses, heads.

Only logged updates are there. A phase is "flow" (stage 1), "G" (student), "D" (heads) or "F" (fake score).
"""

from collections.abc import Sequence
from math import log
from statistics import mean, median, pstdev

from sprint.doctor.findings import Finding, note, ok, wrong
from sprint.recipe.schema import AdversarialLoss, Recipe

Rows = Sequence[dict]
PHASES = {"flow": "stage 1", "G": "the student", "D": "the discriminator", "F": "the fake score"}
STAGE_2 = "GDF"
NAMES = {AdversarialLoss.hinge: "hinge", AdversarialLoss.relativistic: "relativistic loss"}
ENOUGH = 3  # rows of a phase before a course can be told
ENDS = 4  # a quarter at either end is compared
MANY_SKIPPED = 0.1  # share of a phase's updates
GREW = 100.0  # times as large at the end
SATURATED = 0.02  # loss that heads have only where they tell nearly every picture apart
BLIND = {
    AdversarialLoss.hinge: 1.0,
    AdversarialLoss.relativistic: log(2),
}  # of heads that say 0 to everything
FLAT = 1e-4  # deviation over mean of a loss that does not change
APART = 0.01  # least difference of mean logits where the heads tell anything


def examine_curves(rows: Rows, recipe: Recipe | None) -> list[Finding]:
    """recipe   for the norms at which gradients were clipped"""
    findings = []
    for phase, title in PHASES.items():
        logged = [row for row in rows if row.get("phase") == phase]
        if logged:
            findings += _skipped(logged, updates(rows, phase), title)
            findings += _gradients(logged, title, _clip(recipe, phase))
            findings += _loss(logged, title)
    findings += _tangent([row for row in rows if row.get("phase") == "G"])
    kind = recipe.distill.adversarial.loss if recipe else AdversarialLoss.hinge
    return findings + _heads([row for row in rows if row.get("phase") == "D"], kind)


def updates(rows: Rows, phase: str) -> int:
    """How many of a phase there were up to its last line; of stage 2 the kinds take turns."""
    steps = [row["step"] for row in rows if row.get("phase") == phase]
    if not steps:
        return 0
    turns = _turns(rows) if phase in STAGE_2 else [phase]
    rounds, rest = divmod(steps[-1], len(turns))
    return rounds * turns.count(phase) + turns[:rest].count(phase)


def _turns(rows: Rows) -> list[str]:
    """The kinds of updates of stage 2 in their order: a log has the whole of its first round."""
    logged = [(row["step"], row["phase"]) for row in rows if row.get("phase") in STAGE_2]
    following = [phase for k, (step, phase) in enumerate(logged) if step == logged[0][0] + k]
    again = (k for k, phase in enumerate(following) if k > 0 and phase == following[0])
    return following[: next(again, None)]


def _values(rows: Rows, name: str) -> list[float]:
    return [row[name] for row in rows if isinstance(row.get(name), int | float)]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and the last quarter."""
    some = max(1, len(values) // ENDS)
    return median(values[:some]), median(values[-some:])


def _clip(recipe: Recipe | None, phase: str) -> float | None:
    if recipe is None:
        return None
    optimizers = {
        "flow": recipe.adapt.optimizer,
        "G": recipe.distill.optimizer,
        "D": recipe.distill.adversarial.optimizer,
        "F": recipe.distill.matching.optimizer,
    }
    return optimizers[phase].clip_norm


# ---- every phase --------------------------------------------------------------------------------------


def _skipped(rows: Rows, done: int, title: str) -> list[Finding]:
    """`skipped` counts updates without a finite gradient since the stage began."""
    counts = _values(rows, "skipped")
    if not counts:
        return []
    skipped = round(counts[-1])
    if not skipped:
        return [ok("updates", f"{title}: none of {done} was skipped")]
    text = f"{title}: {skipped} of {done} updates were skipped, their gradients were not finite"
    if skipped <= MANY_SKIPPED * done:
        return [note("updates", text, "a few do no harm")]
    return [
        wrong(
            "updates",
            text,
            "skipped updates change nothing: lower the learning rate, lengthen the warm-up, look for broken "
            "pictures or latents (sprint doctor DATA), and give the run another name",
        )
    ]


def _gradients(rows: Rows, title: str, clip: float | None) -> list[Finding]:
    norms = _values(rows, "grad_norm")
    if not norms:
        return []
    first, last = _ends(norms)
    text = f"{title}: norm {first:.3g} at first, {last:.3g} at last"
    if clip is not None:
        text += f", above clip_norm = {clip:g} in {mean(norm > clip for norm in norms):.0%} of lines"
    if last == 0:
        return [wrong("gradient", f"{text}: nothing is learned", _dead(title))]
    if len(norms) >= ENOUGH and last > GREW * first:
        return [wrong("gradient", f"{text}: it explodes", "lower the learning rate, lengthen its warm-up")]
    return [ok("gradient", text)]


def _dead(title: str) -> str:
    if title == PHASES["D"]:
        return "its loss is saturated: raise the noise it sees, or lower its learning rate, and start anew"
    return "the loss does not reach the weights: are they frozen, is every term's weight 0?"


def _loss(rows: Rows, title: str) -> list[Finding]:
    losses = _values(rows, "loss")
    broken = sum("loss" in row and row["loss"] is None for row in rows)
    if broken:
        return [
            wrong(
                "loss",
                f"{title}: not finite in {broken} of {len(rows)} lines, first at step "
                f"{next(row['step'] for row in rows if row.get('loss', 0) is None)}",
                "lower the learning rate, lengthen the warm-up, or go back to a checkpoint before that step",
            )
        ]
    if not losses:
        return []
    first, last = _ends(losses)
    text = f"{title}: {first:.3g} at first, {last:.3g} at last"
    if len(losses) >= ENOUGH and pstdev(losses) <= FLAT * max(abs(mean(losses)), FLAT):
        return [
            wrong(
                "loss",
                f"{text}: it never changes",
                "every batch gives the same: are the data one sample, the learning rate 0, the weights frozen?",
            )
        ]
    return [ok("loss", text)]


# ---- stage 2 ------------------------------------------------------------------------------------------


def _tangent(rows: Rows) -> list[Finding]:
    """‖F′‖ = ‖cos t sin t dF/dt‖, which sCM's target is made of."""
    broken = sum("tangent_norm" in row and row["tangent_norm"] is None for row in rows)
    norms = _values(rows, "tangent_norm")
    cure = (
        "the derivative in time is wild: adapt longer (adapt.steps), keep adapt.qk_norm, and lengthen "
        "distill.consistency.tangent_warmup_updates"
    )
    if broken:
        return [wrong("tangent", f"its norm is not finite in {broken} of {len(rows)} lines", cure)]
    if not norms:
        return []
    first, last = _ends(norms)
    text = f"norm {first:.3g} at first, {last:.3g} at last"
    if len(norms) >= ENOUGH and last > GREW * first:
        return [wrong("tangent", f"{text}: it explodes", cure)]
    return [ok("tangent", text)]


def _heads(rows: Rows, kind: AdversarialLoss) -> list[Finding]:
    """The hinge is 1 for heads that say 0 to everything, and 0 where real is above 1 and fake below −1.

    The relativistic loss is ln 2 of the former, and near 0 where real is far above fake.
    """
    losses, real, fake = (_values(rows, name) for name in ("loss", "logit_real", "logit_fake"))
    if not (losses and real and fake):
        return []
    loss, apart = _ends(losses)[1], _ends([r - f for r, f in zip(real, fake, strict=False)])[1]
    text = f"{NAMES[kind]} {loss:.3g}, real − generated logits {apart:.3g} at last"
    if len(losses) < ENOUGH:
        return [ok("heads", text)]
    if loss < SATURATED:
        return [
            wrong(
                "heads",
                f"{text}: dead, they tell every picture apart and learn nothing more",
                "the student is too far from the data, or the heads learn too fast: lower "
                "distill.adversarial.optimizer.lr, and look at the student's pictures",
            )
        ]
    if abs(loss - BLIND[kind]) < SATURATED and abs(apart) < APART:
        return [
            wrong(
                "heads",
                f"{text}: dead, they say the same of every picture",
                "check that they are trained (distill.adversarial.optimizer.lr) and what they see "
                "(distill.adversarial.taps)",
            )
        ]
    if apart < 0:
        return [
            note("heads", f"{text}: they take generated pictures for real", "watch whether that stays so")
        ]
    return [ok("heads", text)]
