"""A recipe on this machine: would it start, would it fit, and what would it fetch? Nothing is fetched here."""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from sprint.base.door import at_home
from sprint.base.errors import SprintError
from sprint.base.names import BUILT_IN, resolve
from sprint.doctor.data import examine_recipe_data
from sprint.doctor.findings import Finding, note, ok, refused, wrong
from sprint.doctor.machine import Machine, Needs, examine_machine
from sprint.doctor.model import ENCODER_PARTS
from sprint.doctor.weights import names_of
from sprint.models.depth import depth_words
from sprint.models.families import check_role
from sprint.recipe.load import load_recipe, recipe_hash
from sprint.recipe.schema import Optimizer, Recipe
from sprint.train.checks import unlearned_guidance
from sprint.train.plan.activations import FP32
from sprint.train.plan.engines import COPIES, GRADIENTS, average_bytes, count, layout_of, trained
from sprint.train.plan.networks import Networks, build_networks, fake_score_of
from sprint.train.plan.plan import stages_of, totals_of
from sprint.weights.checkpoint import understand
from sprint.weights.hub import folder_here
from sprint.weights.sources import HUB_ID

RUNS = Path("runs")
NOT_KEPT = (GRADIENTS, COPIES)  # of what a process holds of a trained network, no part of a checkpoint


def examine_recipe(name: str, overrides: Sequence[str] = (), machine: Machine | None = None) -> list[Finding]:
    """machine   this one, unless a test says otherwise. Raises SprintError for a recipe that cannot be read."""
    recipe, machine = load_recipe(name, overrides), machine or Machine.this()
    findings = [ok("recipe", f"{recipe.name}, hash {recipe_hash(recipe)}: every setting is in its range")]
    findings += _teacher(recipe) + _family(recipe) + _folder(recipe)
    if told := unlearned_guidance(recipe):
        findings.append(wrong("guidance", told, "set evaluate.guidance_scale to one of these, or between"))
    try:
        needs = needs_of(recipe, build_networks(recipe), max(1, len(machine.gpus)))
    except SprintError as error:
        needs = None
        findings.append(note("plan", f"none can be made: {error}", "memory and disk were not checked"))
    return (
        findings + examine_machine(recipe, needs, RUNS / recipe.name, machine) + examine_recipe_data(recipe)
    )


def needs_of(recipe: Recipe, networks: Networks, gpus: int) -> Needs:
    """Memory of one of `gpus` processes, by the plan of `--dry-run`; checkpoints hold what is trained, whole."""
    kept = [
        totals_of(stage.memory[gpus])[recipe.activation_checkpointing]
        for stage in stages_of(recipe, networks, (gpus,))
    ]
    distill = recipe.distill
    state = _kept(networks.student, distill.optimizer, recipe)
    if distill.matching.weight > 0:
        state += _kept(fake_score_of(recipe, networks), distill.matching.optimizer, recipe)
    average = average_bytes(networks.student, layout_of(recipe, 1)) if distill.ema_decay else 0
    export = FP32 * (count(networks.adapted) + count(networks.student))
    return Needs(max(kept, default=0), state + average, export)


def _kept(module: nn.Module, optimizer: Optimizer, recipe: Recipe) -> float:
    """Bytes of it in a checkpoint."""
    held = trained(module, optimizer.kind, recipe.precision, layout_of(recipe, 1))
    return sum(size for part, size in held.items() if not part.startswith(NOT_KEPT))


# ---- what it is made of -------------------------------------------------------------------------------


def _here(name: str) -> Path | None:
    """Its folder or file, if it is on this machine."""
    path = at_home(resolve(name))
    return path if path.exists() else folder_here(resolve(name))


def _teacher(recipe: Recipe) -> list[Finding]:
    name = recipe.teacher
    if _here(name) is None:
        return [_absent("teacher", name, "teacher")]
    try:
        checkpoint = understand(resolve(name))
        check_role(name, checkpoint.family, checkpoint.config, student=False)
    except SprintError as error:
        return [refused("teacher", error)]
    size = checkpoint.family.size_name(checkpoint.config)
    own = checkpoint.sizes.depth
    told = depth_words(recipe.distill.depth or own, own)
    return [
        ok("teacher", f"{name}: {size}, {checkpoint.time} time" + (f"; its student: {told}" if told else ""))
    ]


def _family(recipe: Recipe) -> list[Finding]:
    """Text encoder and autoencoder."""
    name = recipe.teacher_family or recipe.teacher
    folder = _here(name)
    if folder is None:
        return [] if name == recipe.teacher else [_absent("encoders", name, "teacher_family")]
    missing = [part for part in ENCODER_PARTS if not (folder / part).is_dir()]
    if missing:
        return [
            wrong(
                "encoders",
                f"{name} has no {', '.join(missing)}",
                "set teacher_family to a folder or hub id that has them",
            )
        ]
    return [ok("encoders", f"{name}: {names_of(ENCODER_PARTS)}")]


def _absent(about: str, name: str, key: str) -> Finding:
    """Of something that is not on this machine: it will be fetched, or it cannot be."""
    if name in BUILT_IN or not HUB_ID.fullmatch(name) or name.startswith("."):
        return wrong(about, f"{name}: no such file or folder", f"set {key}=… to where it is")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        cure = f"fetch it first where there is a network: hf download {name}; or unset HF_HUB_OFFLINE"
        return wrong(about, f"{name} is not in the hub's cache, and HF_HUB_OFFLINE is set", cure)
    text = f"{name} is not here: `sprint distill` will download it (how much, only the hub can tell)"
    return note(about, text, f"fetch it before: hf download {name}")


def _folder(recipe: Recipe) -> list[Finding]:
    """The run's own, which belongs to one recipe for good."""
    folder = RUNS / recipe.name
    owner = folder / "recipe.hash"
    try:
        held = owner.read_text(encoding="utf-8", errors="replace").strip() if owner.is_file() else ""
    except OSError as error:
        return [wrong("folder", f"{owner}: {error.strerror}", "mend that, or choose another name=…")]
    if held and held != recipe_hash(recipe):
        text = f"{folder} holds a run of another recipe ({held})"
        return [wrong("folder", text, "choose another name=…, or delete the folder")]
    writable = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(writable, os.W_OK):
        return [wrong("folder", f"{writable} cannot be written", "run it in a folder that can")]
    return [ok("folder", f"{folder}: {'goes on there' if held else 'a new run'}")]
