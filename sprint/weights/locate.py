"""Which files of a folder hold the network? As diffusers names them, and as trainers do."""

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from sprint.base.door import held_against, read_json, shown
from sprint.base.errors import SprintError

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
WEIGHTS = (".safetensors", *PICKLES)
SIDE_FILES = ("extra.safetensors", "logvar.safetensors")  # original-layout tensors beside a diffusers network
USUAL = (
    "diffusion_pytorch_model",
    "model",
    "pytorch_model",
)  # names that diffusers and others give, best first
# stem, variant, number of the shard, suffix, index: as diffusers writes them now and wrote them before
NAME = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<early>[\w-]+?))??(?:-\d+-of-(?P<shards>\d+))?(?:\.(?P<late>(?!.*-of-)[\w-]+))??"
    r"\.(?P<suffix>safetensors|bin|pth|pt|ckpt)(?P<index>\.index(?:\.(?P<last>[\w-]+))?\.json)?",
    re.IGNORECASE,
)
# what trainers keep beside weights, and parts of which no single one is a network
NOT_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|random_states|rng_state|training_args|sampler|custom_checkpoint"
    r"|mp_rank_\d+_model_states|(bf16_)?zero_pp_rank_).*"
)
ZERO_3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states")
MOST_FOLDERS = 200  # of a folder's own folders that are looked into


class Candidate(NamedTuple):
    """A file, an index, or all shards of which there is no index, that may be the network's."""

    files: tuple[Path, ...]
    stem: str  # of USUAL; "" for other names
    variant: str
    is_index: bool

    @property
    def rank(self) -> tuple:
        """As diffusers prefers them; equal ones leave a choice."""
        usual = USUAL.index(self.stem) if self.stem else len(USUAL)
        return not self.stem, "safetensors" not in self.files[0].name.lower(), not self.is_index, usual


class Located(NamedTuple):
    """The files that hold a folder's network, which variant they are, and other weights there, which are not read."""

    files: list[Path]
    variant: str
    others: list[str]


def network_folder(folder: Path) -> Path:
    """The network's own folder in a pipeline's, or itself."""
    if (folder / "transformer").is_dir():
        return folder / "transformer"
    return folder


def refuse_part(file: Path) -> None:
    """Raise SprintError for a file of a checkpoint that torch.distributed or DeepSpeed keeps in parts."""
    if file.name == ".metadata" or file.suffix == ".distcp" or ZERO_3.match(file.name):
        _refuse_parts(file.parent)


def _refuse_parts(folder: Path) -> None:
    """Raise SprintError for the folder of a checkpoint that torch.distributed or DeepSpeed keeps in parts."""
    for place in (folder, *sorted(folder.glob("pytorch_model_fsdp_*"))):
        if (place / ".metadata").exists() or any(place.glob("*.distcp")):
            raise SprintError(
                f"{shown(place)} is a checkpoint of torch.distributed, kept in parts; make a file of it: "
                f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shown(place)} model.pth"
            )
    states = sorted([*folder.glob("mp_rank_*_model_states.pt"), *folder.glob("*/mp_rank_*_model_states.pt")])
    if states or any(folder.glob("global_step*")) or any(folder.glob("zero_pp_rank_*")):
        whole = (
            f", or give {shown(states[0])} where that holds all weights (ZeRO 1 and 2)"
            if len(states) == 1
            else ""
        )
        raise SprintError(
            f"{shown(folder)} is a checkpoint of DeepSpeed, kept in parts; make a file of it: "
            f"python zero_to_fp32.py . model (the script lies in that folder){whole}"
        )


def locate(folder: Path, variant: str | None = None) -> Located:
    """A folder's weights: of the usual name if there are such, else all that there is; and the side files.

    variant   as in diffusers: "bf16" for model.bf16.safetensors; by default the weights without one, or the only one

    Raises SprintError where there are none, and where there is a choice left.
    """
    side = [folder / name for name in SIDE_FILES if (folder / name).exists()]
    for place in (folder, folder / "checkpoints"):
        there = _candidates(place, side)
        found = _of_variant(place, there, variant)
        if not found:
            continue
        best = [one for one in found if one.rank == min(other.rank for other in found)]
        if len(best) > 1:
            names = ", ".join(shown(one.files[0].name) for one in best[:5]) + ", …" * (len(best) > 5)
            raise SprintError(f"{shown(place)} holds {len(best)} checkpoints; give one of them: {names}")
        files = shards_of(best[0].files)
        others = [shown(one.files[0].name) for one in there if one is not best[0]]
        return Located([*files, *side], best[0].variant, others)
    _refuse_parts(folder)
    inside = [one for one in islice(sorted(folder.iterdir()), MOST_FOLDERS) if one.is_dir()]
    inside = [shown(one.name) for one in inside if network_folder(one) != one or _candidates(one, [])]
    hint = f"; perhaps one of its folders: {', '.join(inside[:5])}" if inside else ""
    if cached := sorted([*folder.glob("snapshots/*"), *folder.glob("models--*/snapshots/*")]):
        hint = f"; it is a folder of the hub's cache: give {shown(cached[0])}"
    raise SprintError(f"no model in folder {shown(folder)}: no file ends with {', '.join(WEIGHTS)}{hint}")


def _candidates(place: Path, side: list[Path]) -> list[Candidate]:
    found: list[Candidate] = []
    shards: dict[tuple, list[Path]] = {}
    for file in sorted(place.glob("*")):
        name = file.name.lower()
        is_index = re.search(r"\.index(\.[\w-]+)?\.json$", name) is not None
        if not (name.endswith(WEIGHTS) or is_index) or NOT_WEIGHTS.match(name) or file in side:
            continue
        told = NAME.fullmatch(file.name)
        stem = told["stem"].lower() if told else ""
        variant = (told["early"] or told["late"] or told["last"] or "") if told else ""
        if told and told["shards"]:
            shards.setdefault((stem, variant, told["suffix"], int(told["shards"][:6])), []).append(file)
        else:
            found.append(Candidate((file,), stem, variant, is_index))
    indexed = {(one.stem, one.variant) for one in found if one.is_index}
    for (stem, variant, _, count), files in shards.items():
        if (stem, variant) not in indexed:
            if len(files) != count:
                raise SprintError(
                    f"{shown(place)} holds {len(files)} of the {count} shards of {shown(files[0].name)}"
                )
            found.append(Candidate(tuple(files), stem, variant, True))
    return found


def _of_variant(place: Path, found: list[Candidate], variant: str | None) -> list[Candidate]:
    """The candidates of that variant; without one those of none, or of the only one that there is."""
    variants = sorted({one.variant for one in found})
    if variant is not None and found and variant not in variants:
        listed = ", ".join(filter(None, variants)) or "none"
        raise SprintError(
            f"{shown(place)} has no weights of variant {shown(variant)}; variants there: {listed}"
        )
    if variant is None and "" not in variants and len(variants) > 1:
        raise SprintError(
            f"{shown(place)} holds variants {', '.join(variants)}; choose one with --variant NAME"
        )
    wanted = variant if variant is not None else "" if "" in variants else next(iter(variants), "")
    return [one for one in found if one.variant == wanted]


# ---- indices ------------------------------------------------------------------------------------------


def shards_of(files: Iterable[Path]) -> list[Path]:
    """Files as they are, and in place of an index those that it names, which lie beside it. Raises SprintError."""
    return [
        shard
        for file in files
        for shard in (_indexed(file) if file.name.lower().endswith(".json") else [file])
    ]


def _indexed(index: Path) -> list[Path]:
    weight_map = held_against(
        dict[str, str], read_json(index).get("weight_map"), f"{shown(index)}: weight_map"
    )
    if not weight_map:
        raise SprintError(f"{shown(index)} has no weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise SprintError(
                f"{shown(index)} names the shard {shown(name)}; shards must lie beside their index"
            )
        if not (index.parent / name).is_file():
            raise SprintError(f"{shown(index)} names the shard {shown(name)}, which is missing")
    return [index.parent / name for name in names]
