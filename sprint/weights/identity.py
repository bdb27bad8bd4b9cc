"""Which text encoder and autoencoder these are: SHA-256 over their weights. Nothing with networks is imported."""

import hashlib
import re
from pathlib import Path

from sprint.base.files import sha256
from sprint.base.names import resolve
from sprint.weights.hub import folder_here

FAMILY_PARTS = ("text_encoder", "vae")
USUAL_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")


def family_weights(name: str) -> dict[str, str] | None:
    """SHA-256 of the weights of text encoder and autoencoder, by part; None where they are not on this machine.

    name   built-in name, folder, or hub id that was downloaded before
    """
    folder = folder_here(resolve(name))
    if folder is None:
        return None
    files = {part: _weights_in(folder / part) for part in FAMILY_PARTS}
    return {part: hash_files(found) for part, found in files.items()} if all(files.values()) else None


def _weights_in(folder: Path) -> list[Path]:
    """What is loaded by default: variants such as model.fp16.safetensors do not count."""
    usual = sorted(file for file in folder.glob("*.safetensors") if USUAL_WEIGHTS.fullmatch(file.name))
    return usual or sorted(folder.glob("*.bin"))


def hash_files(files: list[Path]) -> str:
    """One SHA-256 over those of all files."""
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
