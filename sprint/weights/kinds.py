"""What is this file? Told by its first bytes, never by its name: only what holds weights comes through."""

import zipfile
from enum import Enum
from pathlib import Path

from sprint.base.door import parse_json, read_bytes, regular_file, shown
from sprint.base.errors import SprintError

HEAD_BYTES = 512
INDEX_BYTES = 64 * 2**20
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickle that torch.save began files with


class Kind(Enum):
    """Files that hold weights, and the one that says which files do."""

    safetensors = "safetensors"
    torch_zip = "a PyTorch file"
    torch_legacy = "a PyTorch file of before 2020"
    index = "an index of shards"


AGAIN = "download the file itself"
# How files begin that are kept for weights, and what to do with them.
OTHERS = (
    (
        b"version https://git-lfs.github.com/",
        "a Git LFS pointer, not the file it stands for: run git lfs pull",
    ),
    (
        b"GGUF",
        "a GGUF file, whose weights are quantised: give the .safetensors or .pth file that it was made from",
    ),
    (b"\x93NUMPY", "a NumPy array, not a checkpoint"),
    (b"\x89HDF", "an HDF5 (Keras) file: give the PyTorch or safetensors checkpoint"),
    (b"\x1f\x8b", "compressed with gzip: gunzip it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unzstd it first"),
    (b"\xfd7zXZ", "compressed with xz: unxz it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x89PNG", "a picture, not a checkpoint"),
    (b"\xff\xd8\xff", "a picture, not a checkpoint"),
)
PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")
ENDINGS = {
    ".onnx": "an ONNX graph: give the PyTorch or safetensors checkpoint",
    ".msgpack": "a Flax checkpoint: give the PyTorch or safetensors one",
    ".ckpt.index": "a TensorFlow checkpoint: give the PyTorch or safetensors one",
}


def kind_of(file: Path) -> Kind:
    """Raises SprintError that says what else the file is, and what to do then."""
    regular_file(file)
    try:
        with open(file, "rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError as error:
        raise SprintError(f"{shown(file)}: {error.strerror or error}") from error
    if not head:
        raise SprintError(f"{shown(file)} is truncated or not a checkpoint: it is empty; {AGAIN}")
    if head.startswith(LEGACY_MAGIC):
        return Kind.torch_legacy
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(file)
    if _is_safetensors(head):
        return Kind.safetensors
    if what := _something_else(file, head):
        raise SprintError(f"{shown(file)} is {what}")
    if head.lstrip()[:1] == b"{":
        return _kind_of_json(file)
    raise SprintError(f"{shown(file)} is truncated or not a checkpoint: {_hint(head)}")


def _is_safetensors(head: bytes) -> bool:
    """8 bytes of header length, then a JSON object."""
    return head[7:8] == b"\0" and head[8:9] == b"{"


def _kind_of_zip(file: Path) -> Kind:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception as error:  # whatever zipfile meets in a damaged file
        raise SprintError(
            f"{shown(file)} is truncated or not a checkpoint: a damaged zip; {AGAIN}"
        ) from error
    tails = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in tails:
        raise SprintError(
            f"{shown(file)} is a TorchScript program, which would have to be run; give a file of its state_dict"
        )
    if "data.pkl" in tails:
        return Kind.torch_zip
    if any(name.endswith(".npy") for name in names):
        raise SprintError(f"{shown(file)} is NumPy's, not a checkpoint of PyTorch or safetensors")
    raise SprintError(f"{shown(file)} is a zip archive, not a checkpoint: unpack it first")


def _something_else(file: Path, head: bytes) -> str:
    if head.lstrip().lower().startswith(PAGES):
        return (
            f"a web page saved under this name, not a checkpoint: {AGAIN}, logged in if it asks for that "
            "(hf auth login, then hf download ID FILE)"
        )
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    told = [what for start, what in OTHERS if head.startswith(start)]
    told += [what for suffix, what in ENDINGS.items() if file.name.lower().endswith(suffix)]
    return told[0] if told else ""


def _kind_of_json(file: Path) -> Kind:
    """An index has a weight_map; what a server answers instead of a file often is JSON, too."""
    content = parse_json(read_bytes(file, INDEX_BYTES), file)
    if isinstance(content, dict) and "weight_map" in content:
        return Kind.index
    said = content.get("error") if isinstance(content, dict) else None
    said = f" ({shown(said)})" if isinstance(said, str) else ""
    raise SprintError(
        f"{shown(file)} is not a checkpoint but JSON{said}, without the weight_map that an index of shards has"
    )


def _hint(head: bytes) -> str:
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "a pickle that torch.save did not write; save it with torch.save or as safetensors"
    if head.isascii() and b"\0" not in head:
        return "it is text"
    return f"it begins with {head[:8].hex(' ')}; {AGAIN}"
