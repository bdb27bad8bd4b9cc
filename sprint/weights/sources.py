"""Where weights come from: files, shards, folders and the hub, all read tensor by tensor.

Nothing found in a file is executed: safetensors, or `torch.load(weights_only=True)`. Tensors are mapped from
the disk; a `Reader` gives the mapped pages back every few hundred megabytes, so that memory stays small.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.models.families import family_of_class, titles
from sprint.models.teacher import Shape
from sprint.weights.hub import HubError, fetch_folder

MAPPED_BYTES = 256 * 2**20  # a reader lets go of what it has mapped after this much
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
WEIGHTS = (".safetensors", *PICKLES)
INDEX = ".index.json"
USUAL_NAME = re.compile(r"(diffusion_pytorch_|pytorch_)?model\.\w+(\.index\.json)?")
SIDE_FILES = ("extra.safetensors", "logvar.safetensors")  # original-layout tensors beside a diffusers network
TRIGFLOW_FILE = "trigflow.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = [
    "model*",
    "diffusion_pytorch_model*",
    "config.json",
    TRIGFLOW_FILE,
    "transformer/*",
    "checkpoints/*",
]

# What torch.load raises on files that are broken or hostile, besides OSError.
BAD_PICKLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)


@dataclass(frozen=True)
class Entry:
    """One tensor on disk."""

    file: Path
    dtype: torch.dtype
    shape: Shape


@dataclass
class Source:
    """A checkpoint on disk, its tensors unread."""

    name: str  # as the user gave it
    files: list[Path]  # every file that holds tensors
    entries: dict[str, Entry]
    prefix: str = ""  # "state_dict" where the weights lie under that key
    ignored: list[str] = field(default_factory=list)  # what lies beside "state_dict"
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
        self._files: dict[Path, Callable[[str], Tensor]] = {}
        self._mapped = 0

    def __getitem__(self, key: str) -> Tensor:
        if self._mapped > MAPPED_BYTES:
            self._files, self._mapped = {}, 0
        file = self.source.entries[key].file
        if file not in self._files:
            self._files[file] = _tensor_getter(file)
        tensor = self._files[file](key)
        self._mapped += tensor.nbytes
        return tensor


def _tensor_getter(file: Path) -> Callable[[str], Tensor]:
    if file.suffix == ".safetensors":
        return _open_safetensors(file).get_tensor
    return _load_pickle(file)[0].__getitem__


# ---- finding ----------------------------------------------------------------------------------------


def open_source(name: str | Path) -> Source:
    """A file, an index of shards, a folder (diffusers pipeline, transformer, or plain) or a hub id.

    Raises SprintError where there is nothing, or nothing that can be opened as plain weights.
    """
    name = str(name)
    path = Path(name).expanduser()
    if not path.exists():
        if not _looks_like_hub_id(name):
            raise SprintError(f"no file or folder {name}")
        path = _download(name)
    try:
        return _open_folder(name, path) if path.is_dir() else _open_files(name, _shards(path))
    except OSError as error:
        raise SprintError(f"cannot read {error.filename or name}: {error.strerror or error}") from error


def _looks_like_hub_id(name: str) -> bool:
    local = Path(name.split("/")[0]).exists() or name.endswith((*WEIGHTS, ".json"))
    return not local and not name.startswith(".") and HUB_ID.fullmatch(name) is not None


def _download(repo_id: str) -> Path:
    """Only the network's files: not the text encoder, not the autoencoder."""
    try:
        return fetch_folder(repo_id, HUB_FILES)
    except HubError as error:
        raise SprintError(
            f"no file or folder {repo_id}, and the hub did not give a model of that name: {error}"
        ) from error


def _open_folder(name: str, folder: Path) -> Source:
    root = folder.parent if folder.name == "transformer" else folder
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    config = _read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind is not None and family_of_class(kind) is None:
        raise SprintError(f"{folder}: config.json says {kind}, which is not a {titles()} transformer")
    source = _open_files(name, _weights_in(folder))
    source.config = config
    source.trigflow = _read_json(folder / TRIGFLOW_FILE)
    source.pipeline = _read_json(root / "model_index.json").get("_class_name", "")
    return source


def _weights_in(folder: Path) -> list[Path]:
    """A folder's weight files: of the usual name if there is one, else the only index or the only file; and
    the side files."""
    side = [folder / name for name in SIDE_FILES if (folder / name).exists()]
    for place in (folder, folder / "checkpoints"):
        found = [f for f in place.glob("*") if f.name.endswith((*WEIGHTS, INDEX)) and f not in side]
        found.sort(key=lambda f: ("safetensors" not in f.name, not f.name.endswith(INDEX), f.name))
        usual = [f for f in found if USUAL_NAME.fullmatch(f.name)]
        indices = [f for f in found if f.name.endswith(INDEX)]
        for choice in (usual[:1], indices, found):
            if len(choice) == 1:
                return _shards(choice[0]) + side
        if found:
            raise SprintError(f"{place} holds {len(found)} checkpoints; give one of them: {found[0].name}, …")
    raise SprintError(f"no model in folder {folder}: no file ends with {', '.join(WEIGHTS)}")


def _shards(path: Path) -> list[Path]:
    """[path], or the files that an index names."""
    if not path.name.endswith(INDEX):
        if path.suffix not in WEIGHTS:
            raise SprintError(f"{path} is not a checkpoint: its name should end with {', '.join(WEIGHTS)}")
        return [path]
    index = _read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise SprintError(f"{path} has no weight_map")
    shards = [path.parent / str(name) for name in sorted(set(map(str, index.values())))]
    for shard in shards:
        if shard.parent != path.parent or not shard.is_file():
            raise SprintError(f"{path} names the shard {shard.name}, which is missing")
    return shards


def _read_json(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SprintError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise SprintError(f"{path} is not a JSON object")
    return content


# ---- opening ----------------------------------------------------------------------------------------


def _open_files(name: str, files: list[Path]) -> Source:
    source = Source(name, files, {})
    for file in files:
        if file.suffix == ".safetensors":
            weights = _open_safetensors(file)
            source.metadata |= weights.metadata() or {}
            entries = _safetensors_entries(file, weights)
        else:
            tensors, source.prefix, source.ignored = _load_pickle(file)
            entries = [(key, Entry(file, t.dtype, tuple(t.shape))) for key, t in tensors.items()]
        _add_entries(source, entries)
    if not source.entries:
        raise SprintError(f"{name} holds no tensor")
    return source


def _add_entries(source: Source, entries: Iterable[tuple[str, Entry]]) -> None:
    for key, entry in entries:
        if key in source.entries:
            raise SprintError(f"{key} is in both {source.entries[key].file.name} and {entry.file.name}")
        if entry.dtype not in DTYPES.values():
            raise SprintError(
                f"{entry.file}: {key} is {entry.dtype}; weights are float32, 64, 16 or bfloat16"
            )
        source.entries[key] = entry


def _open_safetensors(file: Path):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise SprintError(f"{file} is truncated or not a safetensors file: {error}") from error


def _safetensors_entries(file: Path, weights) -> Iterable[tuple[str, Entry]]:
    for key in weights.keys():  # noqa: SIM118 (not a dict)
        header = weights.get_slice(key)
        yield key, Entry(file, DTYPES.get(header.get_dtype(), header.get_dtype()), tuple(header.get_shape()))


def _load_pickle(file: Path) -> tuple[dict[str, Tensor], str, list[str]]:
    """-> tensors, "state_dict" if they lie under that key, and the names of what lies beside it."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except BAD_PICKLE as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise SprintError(f"{file} refused: opening it would run code ({code[1]})") from error
        raise SprintError(f"{file} is truncated or not a PyTorch checkpoint") from error
    if not isinstance(content, dict):
        raise SprintError(f"{file} holds a {type(content).__name__}, not a dict of tensors")
    prefix = "state_dict" if isinstance(content.get("state_dict"), dict) else ""
    tensors = content[prefix] if prefix else content
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise SprintError(f"{file}: {key!r} is not a plain tensor")
    return tensors, prefix, sorted(str(key) for key in content if key != prefix) if prefix else []
