"""Settings that a run does not read, as others of its recipe stand; who sets one on the command line meant more."""

from collections.abc import Iterable, Iterator

from sprint.base.errors import SprintError
from sprint.recipe.schema import DataKind, EngineKind, Precision, Products, Recipe


def check_read(recipe: Recipe, keys: Iterable[str]) -> None:
    """Raises SprintError for the first of `keys`, groups or single settings, of which nothing is read."""
    unread = list(_unread(recipe))
    for key in keys:
        for prefix, why in unread:
            if key == prefix or key.startswith(f"{prefix}."):
                raise SprintError(f"command line: {key} is set, and nothing reads it: {why}; leave it out")


def _unread(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key or group, why nothing reads it)"""
    adapt, distill = recipe.adapt, recipe.distill
    consistency, adversarial, matching = distill.consistency, distill.adversarial, distill.matching
    if recipe.shard_teacher and recipe.engine is EngineKind.single:
        yield "shard_teacher", "engine = single has nobody to share with"
    if adapt.steps == 0:
        for name in ("optimizer", "caption_dropout"):
            yield f"adapt.{name}", "adapt.steps is 0"
    if distill.steps == 0:
        for name in ("optimizer", "adversarial.optimizer", "matching.optimizer"):
            yield f"distill.{name}", "distill.steps is 0"
    if adversarial.weight == 0:
        looks = ("taps", "time", "max_time_probability", "misaligned_pairs")
        looks = (*looks, "neighbours", "norm_groups", "renoising", "optimizer")
        for name in (*looks, "loss", "r1", "r2", "sigma", "warmup_steps"):
            yield f"distill.adversarial.{name}", "distill.adversarial.weight is 0"
    if not distill.trajectories.states:
        for name in ("steps", "max_time_probability"):
            yield f"distill.trajectories.{name}", "distill.trajectories.states is 0"
    else:
        yield from _unread_on_trajectories(recipe)
    if recipe.products is Products.fastest and recipe.precision is Precision.bf16:
        yield "products", "precision = bf16 multiplies bf16 factors everywhere"
    if adversarial.penalties == 0:
        yield "distill.adversarial.sigma", "distill.adversarial.r1 and r2 are 0"
    if matching.weight == 0:
        for name in ("rollout", "time", "updates", "lora_rank", "optimizer"):
            yield f"distill.matching.{name}", "distill.matching.weight is 0"
    if consistency.weight == 0:
        for name in ("tangent_warmup_updates", "normalise_tangent", "tangent_normalisation"):
            yield f"distill.consistency.{name}", "distill.consistency.weight is 0"
        if matching.weight == 0:
            yield "distill.null_mask", "distill.consistency.weight is 0"
    if not consistency.normalise_tangent:
        yield "distill.consistency.tangent_normalisation", "distill.consistency.normalise_tangent is false"


def _unread_on_trajectories(recipe: Recipe) -> Iterator[tuple[str, str]]:
    distill = recipe.distill
    if distill.consistency.weight > 0 and distill.matching.weight == 0:
        yield "distill.null_mask", "trajectories bring the guided teacher's velocities along"
    if distill.adversarial.weight == 0:
        yield "distill.consistency.time", "states of trajectories have the times of the teacher's steps"
    if recipe.data.kind is DataKind.prompts and recipe.adapt.steps == 0:
        for name in ("teacher_steps", "guidance_scale"):
            yield f"data.{name}", "trajectories have steps and scales of their own, in distill"
