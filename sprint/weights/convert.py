"""`sprint convert`: a checkpoint in any layout becomes a network seen through TrigFlow, or goes back.

source ──► understand ──► written beside the output ──► certificate ──► renamed to the output
"""

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from sprint.base.door import at_home, shown
from sprint.base.dtypes import DTYPES
from sprint.base.errors import SprintError
from sprint.base.files import sha256
from sprint.weights.checkpoint import Checkpoint, understand
from sprint.weights.folder import student_of
from sprint.weights.locate import SIDE_FILES, WEIGHTS
from sprint.weights.trigflow import trigflow_facts, write_trigflow
from sprint.weights.verify import (
    check_bits,
    check_velocity_fast,
    check_velocity_full,
    compare_settings,
    compare_tensors,
    remedy,
)
from sprint.weights.writer import Spec, whole_or_nothing, write_pickle, write_safetensors

Target = Literal["trigflow", "flow", "original"]
Verify = Literal["fast", "full", "off"]
NETWORK_FILE = "diffusion_pytorch_model.safetensors"  # what diffusers looks for
ORIGINAL_FILE = "model.safetensors"
EXTRA_FILE = SIDE_FILES[0]
SUFFIXES = re.compile(r"\.(safetensors(\.index.*)?|pth|pt|bin|ckpt)$", re.IGNORECASE)
MOST_SHOWN = 8  # names of what was left out
ONE_FILE = (".safetensors", ".pth")  # what an original may be written to
# No folder ends so: whoever says that means a file.
OF_FILES = (
    *WEIGHTS,
    ".txt",
    ".json",
    ".yaml",
    ".yml",
    ".zip",
    ".tar",
    ".gguf",
    ".onnx",
    ".pkl",
    ".npz",
    ".md",
)


def convert(
    source: str | Path,
    out: str | Path | None = None,
    to: Target = "trigflow",
    verify: Verify = "fast",
    dtype: str | None = None,
    time_scale: float | None = None,
    cross_attention_heads: int | None = None,
    sample_size: int | None = None,
    weights: str | None = None,
    variant: str | None = None,
    progress: bool = True,
) -> dict:
    """Convert `source`; -> what was done, certificate included (the content of trigflow.json, `out`, and `size`).

    source   a file, an index of shards, a diffusers folder, a run's folder, or a hub id (see `open_source`)
    out      by default NAME-TARGET here
    to       "trigflow": a folder that diffusers opens, with trigflow.json; "flow": the same without it;
             "original": the original's own names, in a folder, or in the one file that `out` names
    verify   "fast": every tensor's bits, velocities of a cut network in fp32; "full": also the whole network
             in fp32 and fp64, and both ways back; "off": only that the output alone tells every setting
    dtype    "fp32", "fp16" or "bf16" for the network's weights; by default they stay as they are
    weights, variant   which of several networks, and of several files (see `open_source`)

    Raises SprintError for bad input, a failed certificate or a full disk; then nothing is left behind.
    """
    _check_choice("--to", to, ("trigflow", "flow", "original"))
    _check_choice("--verify", verify, ("fast", "full", "off"))
    _check_choice("--dtype", dtype, (None, *DTYPES))
    torch_dtype = DTYPES.get(dtype)
    out = default_out(source, to) if out is None else _checked_out(out, to)
    checkpoint = understand(
        student_of(str(source)), time_scale, cross_attention_heads, sample_size, weights, variant
    )
    with whole_or_nothing(out) as place, ThreadPoolExecutor(1) as worker:
        digests = worker.submit(_describe_files, checkpoint)
        written = _write(checkpoint, place, to, torch_dtype, progress)
        certificate = _certify(checkpoint, written, place, to, verify, torch_dtype)
        record = _record(checkpoint, written, digests.result(), certificate)
        if to == "trigflow":
            write_trigflow(place, record)
    return record | {"out": str(out), "size": checkpoint.family.size_name(checkpoint.config)}


def _check_choice(option: str, value: str | None, choices: tuple) -> None:
    if value not in choices:
        raise SprintError(f"{option} {value}: choose one of {', '.join(c for c in choices if c)}")


def default_out(source: str | Path, to: Target) -> Path:
    """NAME-TARGET in the current folder; a pipeline's `transformer` is named after the pipeline."""
    path = Path(os.path.abspath(source))  # "." and ".." have no name of their own
    if path.name == "transformer":
        path = path.resolve().parent
    name = path.name if path.is_dir() else SUFFIXES.sub("", path.name)
    return Path(f"{name}-{to}")


def _checked_out(out: str | Path, to: Target) -> Path:
    """Raises SprintError for a name that says something else than what would be written there."""
    if not str(out):
        raise SprintError("-o is empty; name a folder, or leave it out")
    out = at_home(out)
    suffix = out.suffix.lower()
    if suffix in OF_FILES and not (to == "original" and suffix in ONE_FILE):
        what = (
            f"a folder, or a file that ends with {' or '.join(ONE_FILE)}" if to == "original" else "a folder"
        )
        hint = "; --to original writes one file" if suffix in ONE_FILE else ""
        raise SprintError(f"-o {shown(out)}: --to {to} writes {what}, which is not named {suffix}{hint}")
    return out


# ---- writing ----------------------------------------------------------------------------------------


def _write(
    checkpoint: Checkpoint, place: Path, to: Target, dtype: torch.dtype | None, progress: bool
) -> Checkpoint:
    """Write the target and open it anew, from nothing but itself.

    Raises SprintError where it does not tell every setting of the source's network.
    """
    layout = "original" if to == "original" else "diffusers"
    bar = tqdm(unit="B", unit_scale=True, desc="convert", disable=not progress, leave=False)
    specs = checkpoint.specs(layout, dtype)
    bar.total = sum(kind.itemsize * torch.Size(shape).numel() for kind, shape in specs.values())
    with bar:
        stream = _watched(checkpoint.stream(layout, dtype), bar)
        if layout == "original":
            _write_original(checkpoint, place, specs, stream)
        else:
            _write_diffusers(checkpoint, place, specs, stream)
    try:
        written = understand(place)
    except SprintError as error:
        reason = str(error).replace(str(place), place.name)
        raise SprintError(f"{place.name} alone would not open: {reason}; {remedy(place.name)}") from error
    compare_settings(checkpoint, written, place.name)
    return written


def _watched(stream: Iterable[tuple[str, Tensor]], bar: tqdm) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        yield name, tensor
        bar.update(tensor.nbytes)


def _write_diffusers(
    checkpoint: Checkpoint, folder: Path, specs: dict[str, Spec], stream: Iterator[tuple[str, Tensor]]
) -> None:
    folder.mkdir()
    checkpoint.family.meta_network(checkpoint.config).save_config(folder)
    write_safetensors(folder / NETWORK_FILE, specs, stream, checkpoint.metadata)
    if checkpoint.extras:
        extras = checkpoint.extra_specs(), checkpoint.stream_extras()
        write_safetensors(folder / EXTRA_FILE, *extras, {"format": "pt"})


def _write_original(
    checkpoint: Checkpoint, place: Path, specs: dict[str, Spec], stream: Iterator[tuple[str, Tensor]]
) -> None:
    def with_extras() -> Iterator[tuple[str, Tensor]]:
        yield from stream
        yield from checkpoint.stream_extras()

    if place.suffix.lower() == ".pth":
        write_pickle(place, with_extras())
        return
    if place.suffix.lower() != ".safetensors":
        place.mkdir()
        place = place / ORIGINAL_FILE
    write_safetensors(place, specs | checkpoint.extra_specs(), with_extras(), checkpoint.metadata)


# ---- proving ----------------------------------------------------------------------------------------


def _certify(
    checkpoint: Checkpoint,
    written: Checkpoint,
    place: Path,
    to: Target,
    verify: Verify,
    dtype: torch.dtype | None,
) -> dict:
    if verify == "off":
        return {"verify": "off"}
    certificate = {"verify": verify, "bits": check_bits(checkpoint, written, dtype)}
    certificate["settings"] = len(checkpoint.config) + 1  # the clock; `_write` has compared them
    if verify == "fast":
        certificate["velocity"] = check_velocity_fast(checkpoint, written, dtype)
        return certificate
    certificate["velocity"] = check_velocity_full(
        checkpoint, written, dtype, None if to == "original" else place
    )
    if to == "trigflow":
        certificate["ways_back"] = {
            way: _check_way_back(checkpoint, written, place.parent / f"{way}.safetensors", way, dtype)
            for way in ("flow", "original")
        }
    return certificate


def _check_way_back(
    checkpoint: Checkpoint, written: Checkpoint, place: Path, to: Target, dtype: torch.dtype | None
) -> int:
    """(c): convert the result on, and find the source's tensors in that; -> how many."""
    place = place.with_suffix("") if to == "flow" else place
    return compare_tensors(checkpoint, _write(written, place, to, None, progress=False), dtype)


def _describe_files(checkpoint: Checkpoint) -> list[dict]:
    return [
        {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in checkpoint.source.files
    ]


def _record(checkpoint: Checkpoint, written: Checkpoint, files: list[dict], certificate: dict) -> dict:
    source = checkpoint.source
    return {
        "source": {
            "name": source.name,
            "layout": checkpoint.layout,
            "prefix": source.prefix,
            "unwrapped": source.unwrapped,
            "variant": source.variant,
            "ignored": source.ignored,
            "files": files,
            "tensors": len(source.entries),
            "recomputed": list(checkpoint.recomputed),
            "dtypes": _dtypes(checkpoint),
        },
        **trigflow_facts(checkpoint),
        "dtypes": _dtypes(written),
        "certificate": certificate,
    }


def _dtypes(checkpoint: Checkpoint) -> list[str]:
    return sorted({str(entry.dtype).removeprefix("torch.") for entry in checkpoint.source.entries.values()})


# ---- telling ----------------------------------------------------------------------------------------


def describe(result: dict) -> str:
    """A few lines for a person: size, clock, certificate, place."""
    net, source = result["network"], result["source"]
    heads = next(key for key in net if key.endswith("heads"))  # "cross_attention_heads", say
    traits = ", QK-norm" * net["qk_norm"] + ", guidance" * net["guidance"]
    lines = [
        f"{result['size']}: depth {net['depth']}, width {net['width']}, "
        f"{net['parameters']:,} parameters{traits}",
        f"from {shown(source['name'])}: {source['layout']} layout, {source['tensors']} tensors, "
        f"{' and '.join(source['dtypes'])}",
        *_describe_choice(source),
        f"time: {result['time']}, scale {result['time_scale']:g} (from {result['time_scale_from']})",
        f"{heads.replace('_heads', ' heads').replace('_', '-')}: {net[heads]} (from {net[f'{heads}_from']})",
        *_describe_recomputed(source["recomputed"]),
        *_describe_certificate(result["certificate"]),
        f"written to {shown(result['out'])}",
    ]
    return "\n".join(lines)


def _describe_choice(source: dict) -> Iterator[str]:
    """What was taken of what is there, where that is not all of it."""
    if source["variant"]:
        yield f"variant: {source['variant']}"
    if source["prefix"]:
        yield f"weights: {source['prefix']}"
    if source["unwrapped"]:
        yield f"taken off the names: {' '.join(source['unwrapped'])}"
    if source["ignored"]:
        more = ", …" * (len(source["ignored"]) > MOST_SHOWN)
        yield f"left out: {', '.join(source['ignored'][:MOST_SHOWN])}{more}"


def _describe_recomputed(names: list[str]) -> Iterator[str]:
    if names:
        yield f"left out, since the network computes the same values: {', '.join(names)}"


def _describe_certificate(certificate: dict) -> Iterator[str]:
    if certificate["verify"] == "off":
        yield "not verified (--verify off)"
        return
    yield (
        f"(a) {certificate['bits']['tensors']} source tensors come back {certificate['bits']['equal']}; "
        f"the output alone tells all {certificate['settings']} settings"
    )
    velocity = certificate["velocity"]
    fp64 = "" if velocity["fp64_error"] is None else f", {velocity['fp64_error']:.1e} in fp64"
    where = f"{velocity['network']}, {velocity['times']} times"
    yield f"(b) velocities agree to {velocity['fp32_error']:.1e} in fp32{fp64} ({where})"
    if ways := certificate.get("ways_back"):
        count = min(ways.values())
        yield f"(c) written on to {' and '.join(ways)}, {count} source tensors come back bit for bit"
    else:
        yield "(c) ways back not written out (--verify full of --to trigflow does)"
