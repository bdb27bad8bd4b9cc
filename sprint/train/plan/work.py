"""What an update computes: FLOPs for one picture, from those of the passes that it is made of.

A backward pass costs twice its forward, or once where weights are frozen and gradients only flow through. A tangent
costs what its value does. `python -m tools.bench.flops` counts whole updates operation by operation: they are up to
8% less, since a run reads a text once for all passes of an update.
"""

import math
from dataclasses import dataclass

from sprint.models.discriminator import REACH
from sprint.recipe.schema import DataKind, Recipe
from sprint.train.plan.networks import Networks
from sprint.train.turns import DISCRIMINATOR, FAKE_SCORE, GENERATOR, cycle

ROWS = {
    GENERATOR: "stage 2, the student's update",
    DISCRIMINATOR: "stage 2, the heads' update",
    FAKE_SCORE: "stage 2, the fake score's update",
}


@dataclass(frozen=True)
class Work:
    """FLOPs of the passes for one picture.

    student      forward, of as many blocks as it has
    teacher      forward, adapted or not
    features     of the teacher to its last tap
    heads        of all heads
    kinds        of picture that the discriminator's update sees: real, fake, misaligned, with noise for R1 and R2
    rollout      steps of the student's own samples, on the average
    recomputed   activation checkpointing: what a backward pass needs runs again
    """

    student: float
    teacher: float
    features: float
    heads: float
    kinds: int
    rollout: float
    recomputed: bool

    def flow(self) -> float:
        """Stage 1: one trained pass."""
        return self._trained(self.teacher)

    def consistency(self) -> float:
        """The teacher with and without its prompt; the student's value and tangent; the backward of the value."""
        return 2 * self.teacher + self.student + self._trained(self.student)

    def stored(self, tangent: bool) -> float:
        """The same on a stored velocity, or, without a tangent, regression: one trained pass."""
        return tangent * self.student + self._trained(self.student)

    def adversarial(self) -> float:
        """The student, the features of a real and of its picture, heads over both; back through one picture of them."""
        through = self.features * (3 if self.recomputed else 2)
        return self._trained(self.student) + self.features + through + 2 * 2 * self.heads

    def discriminator(self) -> float:
        """A picture of the student's, the features of every kind, and the heads, trained."""
        return self.student + self.kinds * (self.features + 3 * self.heads)

    def matching(self) -> float:
        """The student's own sample, its last step trained; the teacher with and without its prompt, the fake score."""
        return (self.rollout - 1) * self.student + self._trained(self.student) + 3 * self.teacher

    def fake_score(self) -> float:
        """A sample of the student's, and one trained pass: additions to weights need the weights' gradients too."""
        return self.rollout * self.student + self._trained(self.teacher)

    def _trained(self, forward: float) -> float:
        return forward * (4 if self.recomputed else 3)


def work_of(recipe: Recipe, networks: Networks) -> Work:
    family, sizes, adversarial = networks.family, networks.sizes, recipe.distill.adversarial
    side, text = math.isqrt(networks.tokens) * sizes.patch, recipe.text.max_length
    return Work(
        student=family.forward_flops(networks.student["network"].config, side, text),
        teacher=family.forward_flops(networks.adapted.config, side, text),
        features=family.forward_flops(networks.adapted.config, side, text, max(adversarial.taps) + 1),
        heads=len(adversarial.taps) * 2 * networks.tokens * sizes.width**2 * (1 + 2 * REACH + 1),
        kinds=adversarial.looks,
        rollout=(1 + recipe.distill.matching.rollout) / 2,
        recomputed=recipe.activation_checkpointing,
    )


def drawn(recipe: Recipe) -> tuple[float, float]:
    """Evaluations of the teacher that draw what one sample of stage 1, and of stage 2, begins with."""
    data, path = recipe.data, recipe.distill.trajectories
    of_pictures = 2 * data.teacher_steps if data.kind is DataKind.prompts else 0
    if not path.states or data.kind is DataKind.cache:
        return of_pictures, of_pictures
    return of_pictures, 2 * path.steps / path.states


def flops_of(recipe: Recipe, networks: Networks) -> dict[str, float]:
    """By kind of update, FLOPs for one picture; `run`: of the whole run, with all its pictures."""
    work, adapt, distill = work_of(recipe, networks), recipe.adapt, recipe.distill
    weights = (distill.consistency.weight, distill.adversarial.weight, distill.matching.weight)
    consistent, adverse, matched = (weight > 0 for weight in weights)
    found, run = {}, 0.0
    for name, stage, evaluations in zip(("stage 1", "stage 2"), (adapt, distill), drawn(recipe), strict=True):
        if stage.steps > 0 and evaluations:
            found[f"{name}, {evaluations:g} evaluations to draw"] = evaluations * work.teacher
            run += stage.steps * stage.batch_size * evaluations * work.teacher
    if adapt.steps > 0:
        found["stage 1, an update"] = work.flow()
        run += adapt.steps * adapt.batch_size * work.flow()
    if distill.steps > 0:
        stored, regressed = distill.trajectories.states > 0, distill.regression > 0
        student = consistent * (work.stored(tangent=True) if stored else work.consistency())
        student += (regressed and not consistent) * work.stored(
            tangent=False
        )  # else sCM's pass serves it too
        student += adverse * work.adversarial() + matched * work.matching()
        of_turn = {GENERATOR: student, DISCRIMINATOR: work.discriminator(), FAKE_SCORE: work.fake_score()}
        turns = cycle(distill)
        found |= {ROWS[turn]: of_turn[turn] for turn in turns}
        run += distill.steps * distill.batch_size * sum(of_turn[turn] for turn in turns) / len(turns)
    return found | {"run": run}
