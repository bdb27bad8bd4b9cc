"""A run as data: typed recipes, overrides, and errors that name the nearest valid key.

Every field is explained where it is defined. `recipes/*.yaml` hold only what differs from these defaults.
Steps are counted per stage; in stage 2 a step is one update, of the generator or of the discriminator.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sprint.errors import SprintError


class DataKind(str, Enum):
    scenes = "scenes"  # built-in captioned scenes
    folder = "folder"  # NAME.{jpg,png,webp} with NAME.txt


class AdaptStart(str, Enum):
    calibrated = "calibrated"  # norm weights from the teacher's own q and k; dense time MLP regressed
    ones = "ones"  # the paper's start: norm weights at one, time MLP copied


class OptimizerKind(str, Enum):
    adamw = "adamw"
    came = "came"


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # network in bf16 over fp32 weights; maths and time stay fp32


@dataclass
class Optimizer:
    kind: OptimizerKind = OptimizerKind.came  # of the paper; AdamW for small runs
    lr: float = 2e-6  # after the warm-up
    betas: tuple[float, ...] = (0.9, 0.999, 0.9999)  # two for AdamW, three for CAME
    weight_decay: float = 0.0  # decoupled
    warmup_steps: int = 0  # linear, counted in this optimizer's own updates
    decay_share: float = 0.0  # last share of its updates over which lr falls linearly to 0
    clip_norm: float = 0.1  # on the global gradient norm


@dataclass
class Data:
    kind: DataKind = DataKind.scenes  # built-in scenes, or a folder
    path: str = ""  # folder of pictures, for kind=folder
    size: int = 1024  # pixels, height and width after resize and centre crop
    seed: int = 0  # of the scenes and of the order of pictures


@dataclass
class Text:
    max_length: int = 300  # tokens that the network sees
    instruction: bool = True  # put Sana's "complex human instruction" before each prompt


@dataclass
class Adapt:
    steps: int = 5000  # 0 skips the training, not the conversion
    batch_size: int = 1024  # over all processes
    start: AdaptStart = AdaptStart.calibrated
    shift: float = 3.0  # σ' = a·σ / (1 + (a − 1)·σ) on logit-normal times
    caption_dropout: float = 0.1  # share of samples that see the null prompt
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-5))


@dataclass
class TimeDensity:
    """t = atan(exp(N(mean, std²)) / σ_d)."""

    mean: float = 0.2  # larger leans towards noise
    std: float = 1.6


@dataclass
class Adversarial:
    weight: float = 0.5  # of the LADD term beside sCM; 0 trains without a discriminator
    taps: tuple[int, ...] = (2, 8, 14, 19)  # blocks of the frozen teacher whose outputs feed the heads
    time: TimeDensity = field(default_factory=lambda: TimeDensity(-0.6, 1.0))  # of the renoising
    max_time_probability: float = 0.5  # per sample, generator time becomes π/2
    misaligned_pairs: bool = True  # rolled latents under unshifted prompts count as fakes
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass
class Consistency:
    weight: float = 1.0  # of the sCM term; 0 trains with LADD alone
    time: TimeDensity = field(default_factory=TimeDensity)
    tangent_warmup_updates: int = 2000  # r = min(1, generator updates / this)
    tangent_normalisation: float = 0.1  # the constant c in g / (‖g‖ + c)


@dataclass
class Distill:
    steps: int = 20000  # updates of generator and discriminator together
    batch_size: int = 512  # over all processes
    guidance_scales: tuple[float, ...] = (4.0, 4.5, 5.0)  # drawn uniformly per sample
    consistency: Consistency = field(default_factory=Consistency)
    adversarial: Adversarial = field(default_factory=Adversarial)
    ema_decay: float = 0.0  # of the student's weights per generator update; 0 is off
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass
class Evaluate:
    prompts: int = 600  # held-out scenes for scores and FID; 0 skips both
    steps: tuple[int, ...] = (1, 2, 3, 4)  # of the student
    teacher_steps: int = 20
    guidance_scale: float = 4.5
    batch_size: int = 50


@dataclass
class Recipe:
    name: str = "run"  # the run lives in runs/NAME
    teacher: str = ""  # built-in name ("tiny"), folder, file or hub id
    arch: str = ""  # "0.6b", "1.6b" or "4.8b": what --dry-run builds when the teacher is not on disk
    teacher_family: str = ""  # where text encoder and autoencoder come from, if not beside the teacher
    needs: str = ""  # what a person must bring: weights, data, GPUs, hours; printed by --dry-run
    seed: int = 0
    precision: Precision = Precision.fp32
    micro_batch_size: int = 0  # samples per forward and process, gradients accumulate; 0 takes them all
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, more time
    compile: bool = (
        False  # transformer blocks through torch.compile; needs a compiler, and its first steps minutes
    )
    data: Data = field(default_factory=Data)
    text: Text = field(default_factory=Text)
    adapt: Adapt = field(default_factory=Adapt)
    distill: Distill = field(default_factory=Distill)
    evaluate: Evaluate = field(default_factory=Evaluate)
    save_every: int = 200  # steps between checkpoints
    log_every: int = 5  # steps between lines of metrics.jsonl
    wandb: bool = False  # also log to Weights & Biases (offline unless WANDB_MODE says otherwise)


# Reading: defaults, then the file, then `key=value` overrides; every value is checked as it is set.


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and validate a recipe.

    path        a file, or the bare name of one in ./recipes ("tiny")
    overrides   "key=value" with dotted keys and YAML values ("distill.optimizer.lr=2e-5")

    Raises `SprintError` for a missing or broken file, an unknown key (naming the nearest), a value of the
    wrong type, and whatever `validate` refuses.
    """
    file = _find(path)
    config = OmegaConf.structured(Recipe)
    for key, value in _read_yaml(file).items():
        _assign(config, str(key), value, where=str(file))
    for override in overrides:
        _assign(config, *_parse_override(override), where="command line")
    try:
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # ${interpolations}
        raise SprintError(f"{file}: {_first_line(error)}") from error
    validate(recipe)
    return recipe


def recipe_text(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load_recipe` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe), resolve=True)


def recipe_hash(recipe: Recipe) -> str:
    """Twelve hex digits of SHA-256 over what determines the result: all but names, notes, logging and compilation."""
    settings = OmegaConf.to_container(OmegaConf.structured(recipe), resolve=True, enum_to_str=True)
    for key in ("name", "needs", "arch", "compile", "save_every", "log_every", "wandb"):
        del settings[key]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _find(path: str | Path) -> Path:
    shipped = Path("recipes") / f"{path}.yaml"
    for file in (Path(path), shipped):
        if file.is_file():
            return file
    names = sorted(file.stem for file in Path("recipes").glob("*.yaml"))
    known = f"; recipes here: {', '.join(names)}" if names else ""
    raise SprintError(f"{path}: no such recipe (looked for {Path(path)} and {shipped}{known})")


def _read_yaml(file: Path) -> dict:
    try:
        loaded = OmegaConf.load(file)  # refuses duplicate keys, which plain YAML does not
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise SprintError(f"{file}, line {line}: not valid YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise SprintError(f"{file}: not a readable recipe: {_first_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise SprintError(f"{file}: not a recipe: expected 'key: value' lines, found a list")
    return OmegaConf.to_container(loaded, resolve=False)


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise SprintError(f"command line: {override!r} is not an override; write key=value")
    if _keys().get(key) is str:
        return key, text
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SprintError(f"command line: {override!r}: the value is not valid YAML") from error


def _assign(config: DictConfig, key: str, value: Any, where: str) -> None:
    """Set one key; a mapping sets the keys under it."""
    keys = _keys()
    if key not in keys:
        raise SprintError(f"{where}: {key!r}: no such key; the nearest is {_nearest(key)}")
    if is_dataclass(keys[key]):
        if not isinstance(value, dict | None):
            raise SprintError(f"{where}: {key} = {value!r}, but it is a group of keys, not a value")
        for name, inner in (value or {}).items():
            _assign(config, f"{key}.{name}", inner, where)
        return
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        raise SprintError(f"{where}: {key} = {value!r}, but it takes {_expected(keys[key])}") from error


@cache
def _keys() -> dict[str, type]:
    """Every valid dotted key, of groups too, and its type."""
    return dict(_walk(Recipe, ""))


def _walk(group: type, prefix: str) -> Iterator[tuple[str, type]]:
    for name, kind in get_type_hints(group).items():
        yield prefix + name, kind
        if is_dataclass(kind):
            yield from _walk(kind, f"{prefix}{name}.")


def _nearest(key: str) -> str:
    """The valid key most like `key`: one with the same last name (a key at the wrong level), else any."""
    namesakes = [k for k in _keys() if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return difflib.get_close_matches(key, namesakes or _keys(), n=1, cutoff=0.0)[0]


def _expected(kind: type) -> str:
    if get_origin(kind) is tuple:
        return {int: "a list of whole numbers", float: "a list of numbers"}[get_args(kind)[0]]
    if issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


# Validation: ranges of single keys as a table, then what must hold between keys.

_OPTIMIZERS = ("adapt.optimizer", "distill.optimizer", "distill.adversarial.optimizer")
_DENSITIES = ("distill.consistency.time", "distill.adversarial.time")


def _each(groups: tuple[str, ...], *names: str) -> tuple[str, ...]:
    return tuple(f"{group}.{name}" for group in groups for name in names)


_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "at least 0",
        lambda v: 0 <= v < math.inf,
        (
            *("seed", "data.seed", "adapt.steps", "distill.steps"),
            *("distill.consistency.weight", "distill.adversarial.weight"),
            *("evaluate.prompts", "evaluate.guidance_scale"),
            *_each(_OPTIMIZERS, "weight_decay", "warmup_steps"),
        ),
    ),
    (
        "at least 1",
        lambda v: v >= 1,
        (
            *("data.size", "adapt.batch_size", "distill.batch_size", "evaluate.batch_size"),
            *("distill.consistency.tangent_warmup_updates", "evaluate.teacher_steps"),
            *("save_every", "log_every"),
        ),
    ),
    ("at least 2", lambda v: v >= 2, ("text.max_length",)),
    (
        "above 0",
        lambda v: 0 < v < math.inf,
        (
            *("adapt.shift", "distill.consistency.tangent_normalisation"),
            *_each(_OPTIMIZERS, "lr", "clip_norm"),
            *_each(_DENSITIES, "std"),
        ),
    ),
    ("finite", math.isfinite, _each(_DENSITIES, "mean")),
    (
        "between 0 and 1",
        lambda v: 0 <= v <= 1,
        ("adapt.caption_dropout", "distill.adversarial.max_time_probability"),
    ),
    ("between 0 and 1", lambda v: 0 <= v <= 1, _each(_OPTIMIZERS, "decay_share")),
    ("at least 0 and below 1", lambda v: 0 <= v < 1, ("distill.ema_decay",)),
)


def validate(recipe: Recipe) -> None:
    """Raise a `SprintError` that names the first key whose value cannot work, and what would."""
    for words, holds, keys in _RANGES:
        for key in keys:
            value = attrgetter(key)(recipe)
            if not holds(value):
                raise SprintError(f"recipe {recipe.name}: {key} = {value}, but it must be {words}")
    for key in _OPTIMIZERS:
        _check_betas(recipe, key)
    for holds, problem in _relations(recipe):
        if not holds:
            raise SprintError(f"recipe {recipe.name}: {problem}")


def _check_betas(recipe: Recipe, key: str) -> None:
    optimizer: Optimizer = attrgetter(key)(recipe)
    count = {OptimizerKind.adamw: 2, OptimizerKind.came: 3}[optimizer.kind]
    if len(optimizer.betas) != count or not all(0 <= beta < 1 for beta in optimizer.betas):
        kind, betas = optimizer.kind.value, list(optimizer.betas)
        raise SprintError(
            f"recipe {recipe.name}: {key}.betas = {betas}, but {kind} takes {count} numbers in [0, 1)"
        )


def _relations(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    """(whether it holds, what is wrong if not), one pair for each thing that must hold."""
    from sprint.data.scenes import SIZE

    data, distill, adversarial = recipe.data, recipe.distill, recipe.distill.adversarial
    scenes = data.kind is DataKind.scenes
    yield (
        Path(recipe.name).name == recipe.name not in ("", ".."),
        f"name = {recipe.name!r} cannot name a folder in runs/",
    )
    yield recipe.teacher != "", "teacher is empty; set a built-in name, a folder, a file or a hub id"
    yield scenes or data.path != "", "data.kind = folder needs data.path, the folder of pictures"
    yield not scenes or data.size == SIZE, f"data.size = {data.size}, but scenes are drawn at {SIZE} pixels"
    yield (
        scenes or recipe.evaluate.prompts == 0,
        "evaluate.prompts must be 0 with data.kind = folder: only scenes can be scored",
    )
    yield recipe.evaluate.prompts != 1, "evaluate.prompts = 1, but FID needs at least 2 (or 0 for no scores)"
    yield (
        distill.consistency.weight > 0 or adversarial.weight > 0,
        "distill.consistency.weight and distill.adversarial.weight are both 0: nothing to train on",
    )
    yield (
        distill.batch_size >= 2 or not (adversarial.weight > 0 and adversarial.misaligned_pairs),
        "distill.batch_size = 1, but misaligned pairs need at least 2",
    )
    taps, scales, steps = list(adversarial.taps), list(distill.guidance_scales), list(recipe.evaluate.steps)
    yield (
        taps == sorted(set(taps)) and all(tap >= 0 for tap in taps),
        f"distill.adversarial.taps = {taps}, but blocks are counted from 0 and listed once, in order",
    )
    yield (
        len(taps) > 0 or adversarial.weight == 0,
        "distill.adversarial.taps is empty, but its weight is not 0",
    )
    yield (
        len(scales) > 0 and all(0 <= scale < math.inf for scale in scales),
        f"distill.guidance_scales = {scales}, but it takes one or more numbers of at least 0",
    )
    yield (
        len(steps) > 0 and all(1 <= count <= 4 for count in steps),
        f"evaluate.steps = {steps}, but a student takes 1 to 4 steps",
    )
