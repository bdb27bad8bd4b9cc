"""One hash for all that decides what a model draws."""

import hashlib
import json
from pathlib import Path

from sprint.base.errors import SprintError
from sprint.base.files import sha256
from sprint.base.names import resolve
from sprint.weights.checkpoint import understand
from sprint.weights.folder import student_of
from sprint.weights.hub import folder_here
from sprint.weights.identity import FAMILY_PARTS, family_weights, hash_files
from sprint.weights.settings import settings_of


def model_hash(path: str, family: str | None = None) -> str:
    """SHA-256 over all that decides what is drawn, but for times, size and dtype: these are a `Drawing`'s own.

    It covers weights and configs of network, text encoder and autoencoder, the tokenizer, and how prompts are
    read. Raises SprintError where one of them is not on this machine.

    path     a model that was loaded before, so that its files are here
    family   the folder or hub id of its text encoder and autoencoder, where that is another
    """
    name, around = student_of(resolve(path)), student_of(resolve(family or path))
    network, settings = understand(name), settings_of(name, family and around)
    weights = family_weights(around)
    if weights is None:
        raise SprintError(f"{path}: no weights of {' and '.join(FAMILY_PARTS)} here; name a complete folder")
    facts = {
        "weights": weights | {"network": hash_files(network.source.files)},
        "network": network.config,
        "time_scale": network.time_scale,
        "files": _family_files(path, folder_here(around)),
        "text": [settings.max_length, settings.instruction],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _family_files(path: str, folder: Path) -> dict[str, str]:
    """SHA-256 of what stands beside the family's weights: configs, and all of the tokenizer."""
    configs = [folder / part / "config.json" for part in FAMILY_PARTS]
    tokenizer = sorted(f for f in (folder / "tokenizer").glob("[!.]*") if f.is_file())
    missing = [config for config in configs if not config.is_file()]
    if missing or not tokenizer:
        part = missing[0].relative_to(folder) if missing else "tokenizer"
        raise SprintError(f"{path}: no {part} there; name a complete folder")
    return {file.relative_to(folder).as_posix(): sha256(file) for file in (*configs, *tokenizer)}
