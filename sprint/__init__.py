"""sprint: distil a flow-matching image model into one that samples in 1 to 4 steps.

    import sprint

    sprint.load("runs/tiny/student")(["a red circle"], steps=1)[0].save("circle.png")
    sprint.distill("tiny", "distill.steps=400", "name=short")
    sprint.convert("teacher.safetensors", "teacher")

What each raises for bad input is a `sprint.SprintError`, whose text is one line. Nothing heavy is imported
before a function is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sprint.base.errors import SprintError
from sprint.base.system import check_system

if TYPE_CHECKING:
    from sprint.sample.generate import Generator

__version__ = "0.1.0"
__all__ = ["Converted", "Distilled", "SprintError", "convert", "distill", "load"]


class Distilled(NamedTuple):
    """What a run leaves: its folder, in it the student (a diffusers folder) and the page about it."""

    folder: Path
    student: Path
    report: Path


class Converted(NamedTuple):
    """A teacher in another layout: where it is, and its source, clock, sizes and certificate."""

    path: Path
    facts: dict[str, Any]


def load(
    model: str | Path,
    device: str | None = None,
    dtype: Literal["fp32", "bf16"] = "fp32",
    family: str | Path | None = None,
) -> Generator:
    """A student or a teacher, ready to draw.  -> call it with prompts, get PIL pictures

    model    a student's, teacher's or run's folder, a hub id, or "tiny", the built-in teacher
    device   "cpu", "cuda", …; by default CUDA's where there is one
    dtype    of the weights
    family   where text encoder and autoencoder are, if the model has none: a converted network, say

    Raises SprintError where there is no such model, or no such device.

        draw = sprint.load("runs/tiny/student")
        circle, square = draw(["a red circle", "a blue square"], steps=2, seeds=7)
        draw("a red circle", steps=1, guidance=5.0)[0].save("circle.png")
    """
    check_system()
    from sprint.base.dtypes import DTYPES
    from sprint.base.place import usable_device
    from sprint.sample.load import load_generator

    _check("dtype", dtype, ("fp32", "bf16"))
    around = None if family is None else str(family)
    return load_generator(str(model), usable_device(device), DTYPES[dtype], around)


def distill(recipe: str | Path, *overrides: str, runs: str | Path = "runs") -> Distilled:
    """A teacher becomes a student: adapted, distilled, drawn and scored, as `sprint distill` does.

    recipe      a file, or the name of one in ./recipes or in the package (`sprint recipes` lists those)
    overrides   "key=value", as on the command line
    runs        folder of all runs; this one goes to its own, named by the recipe's `name`

    Called again it goes on where it stopped, and a finished run is not run again. Ctrl-C saves first.
    Raises SprintError for a recipe that cannot run, KeyboardInterrupt once an interrupted run is saved.

        run = sprint.distill("tiny", "distill.steps=400", "name=short")
        sprint.load(run.student)(["a red circle"], steps=1)
    """
    check_system()
    from sprint.recipe.load import load_recipe
    from sprint.train.loop import Interrupted
    from sprint.train.run import distill as run

    for override in overrides:
        if not isinstance(override, str):
            raise TypeError(f'overrides are texts, "key=value", each an argument; not {override!r}')
    settings = load_recipe(recipe, overrides)
    where = [f"runs={str(runs)!r}"] if Path(runs) != Path("runs") else []
    call = f"sprint.distill({', '.join([*map(repr, (str(recipe), *overrides)), *where])})"
    try:
        run(settings, Path(runs), command=call)
    except Interrupted as stopped:
        raise KeyboardInterrupt(f"{stopped}; the same call goes on from there") from None
    folder = Path(runs) / settings.name
    return Distilled(folder, folder / "student", folder / "report.html")


def convert(
    source: str | Path,
    out: str | Path | None = None,
    *,
    to: Literal["trigflow", "flow", "original"] = "trigflow",
    verify: Literal["fast", "full", "off"] = "fast",
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    time_scale: Literal["sparse", "dense"] | None = None,
    cross_attention_heads: int | None = None,
    sample_size: int | None = None,
    weights: str | None = None,
    variant: str | None = None,
) -> Converted:
    """A teacher's weights in another layout, proved bit for bit, as `sprint convert` does.

    source      .safetensors, .pth, a folder (sharded, diffusers, converted) or a hub id
    out         output folder, or a .safetensors or .pth file with to="original"; by default NAME-TARGET here
    to          "trigflow": a folder that diffusers opens, with trigflow.json; "flow": the same without it;
                "original": Sana's own names
    verify      "full" checks the whole network in fp64 and both ways back, "fast" one cut short
    dtype       round the weights to this; by default they stay as they are
    time_scale  what the teacher embeds, where its files do not tell: "sparse" is 1000·t, "dense" t itself
    cross_attention_heads  where neither config nor width tells
    sample_size  latent cells a side, where nothing tells whether it is a teacher for 512 px, 1K, 2K or 4K
    weights     which of a file's networks: "state_dict_ema", "model.ema"
    variant     which of a folder's files: "bf16" for model.bf16.safetensors

    Raises SprintError for bad input, a failed certificate or a full disk; then nothing is left behind.

        teacher = sprint.convert("teacher.safetensors", "teacher", verify="full")
        teacher.facts["certificate"]["velocity"]["fp64_error"]
    """
    check_system()
    from sprint.base.names import resolve
    from sprint.weights.checkpoint import TIMES
    from sprint.weights.convert import convert as run

    _check("time_scale", time_scale, (None, *TIMES))
    scale = None if time_scale is None else TIMES[time_scale]
    facts = run(
        resolve(str(source)),
        out,
        to=to,
        verify=verify,
        dtype=dtype,
        time_scale=scale,
        cross_attention_heads=cross_attention_heads,
        sample_size=sample_size,
        weights=weights,
        variant=variant,
    )
    del facts["size"]  # words for the command line
    return Converted(Path(facts.pop("out")), facts)


def _check(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise SprintError(f"{name} {value}: choose one of {', '.join(c for c in choices if c)}")
