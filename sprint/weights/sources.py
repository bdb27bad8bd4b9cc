"""Where weights come from: files, shards, folders and the hub, all read tensor by tensor.

    which files?         sprint.weights.locate
    what is a file?      sprint.weights.kinds
    what is in it?       the header of a safetensors file; sprint.weights.pickles
    which is the network?  sprint.weights.wrappers

Nothing found in a file is executed. Tensors are mapped from the disk; a `Reader` gives the mapped pages back every few
hundred megabytes, so that memory stays small.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sprint.base.door import at_home, check_no_address, read_json, shown
from sprint.base.errors import SprintError
from sprint.models.families import family_of_class, titles
from sprint.models.teacher import Shape
from sprint.weights.hub import HubError, fetch_folder
from sprint.weights.kinds import Kind, kind_of
from sprint.weights.locate import WEIGHTS, locate, network_folder, refuse_part, shards_of
from sprint.weights.pickles import Pickled, Spot, no_values, open_pickle, read_spot, refusal, spot_of
from sprint.weights.unpickle import Described, Opaque
from sprint.weights.wrappers import Leaf, find_network, networks_in

MAPPED_BYTES = 256 * 2**20  # a reader lets go of what it has mapped after this much
LONGEST_HEADER = 16 * 2**20  # of a safetensors file: 100,000 tensors need 12 MB
MOST_SHARED = 2  # a file's tensors take at most this many times its bytes: a few may be the same
DEEPEST = 8  # dicts around a tensor
TRIGFLOW_FILE = "trigflow.json"
WHOLE = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
RUNS = "runs/"  # where `sprint distill` writes: a name in there is no hub id
HUB_FILES = [
    "model*",
    "diffusion_pytorch_model*",
    "config.json",
    TRIGFLOW_FILE,
    "transformer/*",
    "checkpoints/*",
]


@dataclass(frozen=True)
class Entry:
    """One tensor on disk: its name in a safetensors file, or where its elements are in another."""

    file: Path
    dtype: torch.dtype
    shape: Shape
    place: str | Spot


@dataclass
class Source:
    """A checkpoint on disk, its tensors unread."""

    name: str  # as the user gave it
    files: list[Path]  # every file that holds tensors
    entries: dict[str, Entry]
    prefix: str = ""  # the key under which the weights lie: "state_dict", say
    unwrapped: list[str] = field(default_factory=list)  # taken off their names: "module.", say
    ignored: list[str] = field(default_factory=list)  # what lies beside them
    variant: str = ""  # "bf16" of model.bf16.safetensors
    metadata: dict[str, str] = field(default_factory=dict)  # of safetensors
    config: dict = field(default_factory=dict)  # config.json
    pipeline: str = ""  # _class_name of model_index.json
    trigflow: dict = field(default_factory=dict)  # trigflow.json

    @property
    def shapes(self) -> dict[str, Shape]:
        return {key: entry.shape for key, entry in self.entries.items()}


class Reader:
    """`reader[key]` -> Tensor on the CPU, mapped from the source's file, not to be written to."""

    def __init__(self, source: Source):
        self.source = source
        self._files: dict[Path, Callable[[str | Spot], Tensor]] = {}
        self._mapped = 0

    def __getitem__(self, key: str) -> Tensor:
        if self._mapped > MAPPED_BYTES:
            self._files, self._mapped = {}, 0
        entry = self.source.entries[key]
        if entry.file not in self._files:
            self._files[entry.file] = _tensor_getter(entry)
        tensor = self._files[entry.file](entry.place)
        self._mapped += tensor.nbytes
        return tensor


def _tensor_getter(entry: Entry) -> Callable[[str | Spot], Tensor]:
    if isinstance(entry.place, str):
        return _open_safetensors(entry.file).get_tensor
    size = entry.file.stat().st_size
    mapped = torch.from_file(str(entry.file), shared=False, size=size, dtype=torch.uint8)
    return lambda spot: read_spot(mapped, spot)


# ---- finding ----------------------------------------------------------------------------------------


def open_source(name: str | Path, weights: str | None = None, variant: str | None = None) -> Source:
    """A file, an index of shards, a folder (a diffusers pipeline, a transformer, or plain) or a hub id.

    weights   which network of several: "state_dict_ema", "model.ema"
    variant   which files of a folder: "bf16" for model.bf16.safetensors

    Raises SprintError where there is nothing, or nothing that can be opened as plain weights.
    """
    name = str(name)
    path = _find(name)
    try:
        return (
            _open_folder(name, path, weights, variant)
            if path.is_dir()
            else _open_file(name, path, weights, variant)
        )
    except OSError as error:
        raise SprintError(
            f"cannot read {shown(error.filename or name)}: {error.strerror or error}"
        ) from error


def _find(name: str) -> Path:
    if not name:
        raise SprintError("the name of the model is empty; give a file, a folder or a hub id")
    check_no_address(name)
    path = at_home(name)
    try:
        there = path.exists()
    except OSError as error:  # a name that no file can have
        raise SprintError(f"no file or folder {shown(name)}: {error.strerror}") from error
    if there:
        return path
    if not _looks_like_hub_id(name):
        raise SprintError(f"no file or folder {shown(name)}")
    try:  # only the network's files: not the text encoder, not the autoencoder
        return fetch_folder(name, HUB_FILES)
    except HubError as error:
        raise SprintError(f"no file or folder {name}; from the hub: {error}") from error


def _looks_like_hub_id(name: str) -> bool:
    local = (
        Path(name.split("/")[0]).exists()
        or name.startswith(RUNS)
        or name.lower().endswith((*WEIGHTS, ".json"))
    )
    return not local and not name.startswith(".") and HUB_ID.fullmatch(name) is not None


def _open_folder(name: str, folder: Path, weights: str | None, variant: str | None) -> Source:
    folder = network_folder(folder)
    root = folder.parent if folder.name == "transformer" else folder
    config = _json_of(folder / "config.json")
    kind = config.get("_class_name")
    if kind is not None and family_of_class(kind) is None:
        raise SprintError(
            f"{shown(folder)}: config.json says {shown(kind)}, which is not a {titles()} transformer"
        )
    located = locate(folder, variant)
    source = _open_files(name, located.files, weights)
    source.variant = located.variant
    source.ignored += located.others
    source.config = config
    source.trigflow = _json_of(folder / TRIGFLOW_FILE)
    source.pipeline = _json_of(root / "model_index.json").get("_class_name", "")
    if folder.name == "transformer" and (root / "transformer_ema").is_dir():
        source.ignored.append("transformer_ema")
    return source


def _json_of(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def _open_file(name: str, path: Path, weights: str | None, variant: str | None) -> Source:
    if variant is not None:
        raise SprintError(f"--variant chooses among the files of a folder; {shown(name)} is a file")
    refuse_part(path)
    files = shards_of([path]) if kind_of(path) is Kind.index else [path]
    return _open_files(name, files, weights)


# ---- opening ----------------------------------------------------------------------------------------


@dataclass
class _Opened:
    """The files of a source, and what each holds: by its path and name a tensor, or None for what is none."""

    files: dict[Path, Any] = field(default_factory=dict)  # an open safetensors file or a Pickled
    leaves: dict[Leaf, tuple[Path, Described | None] | None] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def add(self, file: Path) -> None:
        kind = kind_of(file)
        if kind is Kind.index:
            raise SprintError(f"{shown(file)} is an index of shards, not a shard")
        if kind is Kind.safetensors:
            opened = self.files[file] = _open_safetensors(file)
            self.metadata |= opened.metadata() or {}
            found = {((), key): (file, None) for key in opened.keys()}  # noqa: SIM118 (not a dict)
        else:
            opened = self.files[file] = open_pickle(file, kind)
            leaves = dict(_leaves_of(opened.content))
            _refuse_code(opened, leaves)
            if not isinstance(opened.content, dict):
                raise SprintError(f"{shown(file)} holds {_a(opened.content)}, not a dict of tensors")
            if not any(leaves.values()):
                _refuse_nameless(file, opened.content)
            found = {leaf: None if tensor is None else (file, tensor) for leaf, tensor in leaves.items()}
        for leaf in found:
            if found[leaf] is not None and (other := self.leaves.get(leaf)) is not None:
                raise SprintError(
                    f"{shown(leaf[1])} is in both {shown(other[0].name)} and {shown(file.name)}"
                )
        self.leaves |= found

    def counters(self) -> set[Leaf]:
        """Tensors of one whole number, as trainers keep beside weights."""
        return {
            leaf for leaf, found in self.leaves.items() if found is not None and self._counts(leaf, *found)
        }

    def _counts(self, leaf: Leaf, file: Path, tensor: Described | None) -> bool:
        if tensor is not None:
            return tensor.dtype in WHOLE.values() and math.prod(tensor.shape) <= 1
        header = self.files[file].get_slice(leaf[1])
        return header.get_dtype() in WHOLE and math.prod(header.get_shape()) <= 1

    def entry(self, leaf_name: str, file: Path, tensor: Described | None) -> Entry:
        """Raises SprintError for what is no plain tensor of weights."""
        if tensor is not None:
            place = spot_of(self.files[file], leaf_name, tensor)
            entry = Entry(file, place.dtype, place.shape, place)
        else:
            header = self.files[file].get_slice(leaf_name)
            dtype = DTYPES.get(header.get_dtype(), header.get_dtype())
            entry = Entry(file, dtype, tuple(header.get_shape()), leaf_name)
        if entry.dtype not in DTYPES.values():
            raise SprintError(
                f"{shown(file)}: {shown(leaf_name)} is {entry.dtype}; weights are float32, 64, 16 or bfloat16, "
                "so give the model that it was made from"
            )
        if not math.prod(entry.shape):
            raise SprintError(f"{shown(file)}: {shown(leaf_name)} {no_values(entry.shape)}")
        return entry


def _open_files(name: str, files: list[Path], weights: str | None) -> Source:
    """All tensors of all files; of these the network's."""
    opened = _Opened()
    for file in files:
        opened.add(file)
    leaves = {leaf: None if found is None else (leaf[1], *found) for leaf, found in opened.leaves.items()}
    network = find_network(shown(name), leaves, opened.counters(), weights)
    entries = {own: opened.entry(*found) for own, found in network.tensors.items()}
    needed = sum(entry.dtype.itemsize * math.prod(entry.shape) for entry in entries.values())
    if needed > MOST_SHARED * sum(file.stat().st_size for file in files):
        raise SprintError(
            f"{shown(name)}: its tensors share their elements: {needed:,} bytes are not in its files"
        )
    return Source(
        name,
        files,
        entries,
        prefix=".".join(network.place.path),
        unwrapped=network.unwrapped,
        ignored=network.left_out,
        metadata=opened.metadata,
    )


def _open_safetensors(file: Path):
    with open(file, "rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if header > LONGEST_HEADER:
        raise SprintError(
            f"{shown(file)} is truncated or not a safetensors file: a header of {header:,} bytes"
        )
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise SprintError(f"{shown(file)} is truncated or not a safetensors file: {shown(error)}") from error


def _leaves_of(
    content: Any, path: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[Leaf, Any]]:
    """Tensors in dicts of dicts, each dict once; None for whatever else lies there."""
    seen = set() if seen is None else seen
    if not isinstance(content, dict) or id(content) in seen:
        return
    seen.add(id(content))
    for key, value in content.items():
        leaf = path, key if type(key) is str else f"({_a(key)})"
        if isinstance(value, Described):
            yield leaf, value if type(key) is str else None
        elif isinstance(value, dict) and value and type(key) is str and len(path) < DEEPEST:
            before = len(seen)
            yield from _leaves_of(value, (*path, key), seen)
            if len(seen) == before:  # it is there under another key
                yield leaf, None
        else:
            yield leaf, None


def _refuse_nameless(file: Path, content: Any, deep: int = 0) -> None:
    """Raise SprintError for a file whose weights are there, but not as tensors under names."""
    for key, value in content.items() if isinstance(content, dict) and deep < DEEPEST else ():
        if isinstance(value, list | tuple) and any(isinstance(one, Described) for one in value):
            raise SprintError(
                f"{shown(file)}: {shown(key)} is a list of tensors without their names, as EMA classes keep them; "
                "load it into the network there (copy_to), and save the network's state_dict"
            )
        if isinstance(value, Opaque) and value.name.startswith("numpy."):
            raise SprintError(
                f"{shown(file)} holds NumPy arrays, no tensors; save tensors (torch.from_numpy of each)"
            )
        _refuse_nameless(file, value, deep + 1)


def _a(value: Any) -> str:
    if isinstance(value, Opaque):
        return shown(value.name)
    return {list: "a list", tuple: "a tuple", Described: "a tensor"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _refuse_code(opened: Pickled, leaves: Mapping[Leaf, Described | None]) -> None:
    """Raise SprintError for a file that would run code elsewhere, with the Python that leads to its weights there."""
    if not opened.foreign:
        return
    content, way = opened.content, "c"
    networks = networks_in(leaf for leaf, tensor in leaves.items() if tensor is not None)
    paths = list(dict.fromkeys(place.path for place in networks))
    if isinstance(content, Opaque):
        way = "c.state_dict()"
    elif () in paths:
        way = "{k: v for k, v in c.items() if torch.is_tensor(v)}"
    elif paths:
        way = ", ".join(f"{'.'.join(path)!r}: c" + "".join(f"[{key!r}]" for key in path) for path in paths)
        way = f"{{{way}}}"
    elif isinstance(content, dict):
        objects = [
            key
            for key, value in content.items()
            if isinstance(value, Opaque) and value.name in opened.foreign
        ]
        way = f"c[{objects[0]!r}].state_dict()" if objects else way
    raise SprintError(refusal(opened.file, opened.foreign, way))
