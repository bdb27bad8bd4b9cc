"""Real pictures to compare with, and the features of many files.

The paper's are MJHQ-30K's, 30 000 pictures of 10 kinds with their prompts (hub dataset playgroundai/MJHQ-30K); any
folder of pictures will do, or the statistics of a set that was measured before.
"""

import hashlib
import json
import os
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from sprint.base.door import at_home
from sprint.base.errors import NotHereError, SprintError
from sprint.base.files import write_whole
from sprint.data.items import BadSample, said
from sprint.data.pictures import DECODERS, to_rgb
from sprint.evaluate.metrics.gaussian import GaussianStatistics
from sprint.evaluate.metrics.inception import FeatureNetwork, at_size

MJHQ = "playgroundai/MJHQ-30K"
MJHQ_PROMPTS = "meta_data.json"
MJHQ_ZIP = "mjhq30k_imgs.zip"
MJHQ_FETCH = f"hf download {MJHQ} {MJHQ_PROMPTS} {MJHQ_ZIP} --repo-type dataset --local-dir FOLDER"
MJHQ_UNPACK = f"unzip {MJHQ_ZIP} -d mjhq30k_imgs"
MJHQ_PICTURES = ("mjhq30k_imgs", "imgs", ".")  # "imgs" as Sana's evaluation has it

FILES_AT_ONCE = 256  # pictures: what an interruption costs at most, in each process
BATCH = 64  # pictures that the network sees at once
READERS = 8  # threads that decode
AHEAD = 2 * BATCH  # pictures that are decoded before the network asks for them


class RealPicture(NamedTuple):
    """key     names it in its set
    prompt   None where there is no caption
    """

    key: str
    prompt: str | None
    path: Path


class RealStatistics(NamedTuple):
    """A `Gaussian` from a file: enough for FID, not for KID. What the file does not say is None.

    mean [D], covariance [D, D]   float64
    network                       the `name` of the network that saw the pictures
    size                          the side in pixels that they were resized to; 0 if they were not
    count                         pictures
    """

    mean: Tensor
    covariance: Tensor
    network: str | None = None
    size: int | None = None
    count: int | None = None

    def check(self, network: str, size: int | None) -> None:
        """Raises SprintError where the file says that it is of another network or size."""
        if self.network not in (None, network):
            raise SprintError(
                f"statistics are of {self.network}, and the pictures of {network}; use one network"
            )
        if self.size not in (None, size or 0):
            raise SprintError(
                f"statistics are of pictures at {self.size} px, and these at {size or 0}; use one size"
            )


# ---- finding ----------------------------------------------------------------------------------------


def open_reference(path: str | Path) -> list[RealPicture] | RealStatistics:
    """MJHQ-30K's folder, a folder of pictures (with captions NAME.txt or without), or a file of statistics.

    A file is .npz with `mu` [D] and `sigma` [D, D], as pytorch-fid writes it, or .safetensors of `save_statistics`.
    Raises NotHereError where there is nothing, and SprintError for what cannot be used.
    """
    path = at_home(path)
    if path.is_dir():
        return mjhq(path) if (path / MJHQ_PROMPTS).is_file() else _plain(path)
    if not path.exists():
        raise NotHereError(f"{path}: no such file or folder; for MJHQ-30K: {MJHQ_FETCH}, then {MJHQ_UNPACK}")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    remedy = (
        "unpack it and give the folder" if path.suffix == ".zip" else "give a folder, .npz or .safetensors"
    )
    raise SprintError(f"{path}: not a reference to compare with; {remedy}")


def mjhq(folder: str | Path) -> list[RealPicture]:
    """MJHQ-30K in the order of its meta_data.json, of which "the first N" counts.

    folder   with meta_data.json {ID: {"category": …, "prompt": …}} and CATEGORY/ID.jpg, in mjhq30k_imgs, in imgs or
             beside it

    Raises NotHereError, which says how to fetch it, without meta_data.json, and SprintError where that is not as
    above, or where pictures are missing.
    """
    folder = at_home(folder)
    file = folder / MJHQ_PROMPTS
    if not file.is_file():
        raise NotHereError(f"{file}: not here; fetch {MJHQ}: {MJHQ_FETCH}, then {MJHQ_UNPACK}")
    entries = _mjhq_entries(file)
    categories = sorted({category for _, category, _ in entries})
    root = next((folder / name for name in MJHQ_PICTURES if (folder / name / categories[0]).is_dir()), None)
    if root is None:
        problem = (
            f"{MJHQ_ZIP} is not unpacked" if (folder / MJHQ_ZIP).is_file() else "the pictures are not here"
        )
        remedy = MJHQ_UNPACK if (folder / MJHQ_ZIP).is_file() else f"{MJHQ_FETCH}, then {MJHQ_UNPACK}"
        raise NotHereError(f"{folder}: {problem}; {remedy}")
    there = {(c, name) for c in categories if (root / c).is_dir() for name in os.listdir(root / c)}
    missing = [
        f"{category}/{key}.jpg" for key, category, _ in entries if (category, f"{key}.jpg") not in there
    ]
    if missing:
        raise SprintError(
            f"{root / missing[0]}: missing, one of {len(missing)} of {len(entries)}; unpack {MJHQ_ZIP} once more"
        )
    return [RealPicture(key, prompt, root / category / f"{key}.jpg") for key, category, prompt in entries]


def _mjhq_entries(file: Path) -> list[tuple[str, str, str]]:
    """Key, category, prompt of each."""
    try:
        entries = json.loads(file.read_bytes())
        found = [(key, entry["category"], entry["prompt"]) for key, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SprintError(
            f'{file}: expected {{ID: {{"category": …, "prompt": …}}}} ({said(error)}); fetch it from {MJHQ}'
        ) from error
    for key, category, prompt in found:
        texts = all(isinstance(text, str) for text in (category, prompt))
        if not texts or any(name in ("", ".", "..") or "/" in name for name in (key, category)):
            raise SprintError(f"{file}: {key!r}: category and prompt must be text, and names those of files")
    if not found:
        raise SprintError(f"{file}: names no pictures; fetch it from {MJHQ}")
    return found


def _plain(folder: Path) -> list[RealPicture]:
    from sprint.data.kinds.folder import Pair, find_pairs, read_caption  # seconds: it brings diffusers

    def caption(pair: Pair) -> str | None:
        try:
            return read_caption(pair, 1.0, np.random.default_rng(0)) if pair.captioned else None
        except BadSample as bad:
            if bad.reason == "missing caption":  # a KEY.json about something else
                return None
            raise SprintError(f"{bad}; mend it or remove it") from bad

    pairs = [pair for pair in find_pairs(folder, bad_share=1.0) if pair.picture]
    captions = [caption(pair) for pair in pairs]
    paths = [Path(pair.picture) for pair in pairs]
    keys = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    return [RealPicture(*one) for one in zip(keys, captions, paths, strict=True)]


# ---- statistics in files ----------------------------------------------------------------------------


def save_statistics(path: Path, statistics: GaussianStatistics, network: str, size: int | None) -> None:
    """Keeps what `open_reference` reads: .safetensors, whole or not at all."""
    about = {"network": network, "size": str(size or 0)}
    write_whole(path, save(statistics.tensors(), about))


def _read_safetensors(path: Path) -> RealStatistics:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            statistics = GaussianStatistics.of_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            covariance = statistics.covariance
            size = int(about["size"]) if "size" in about else None
    except (SafetensorError, SprintError, ValueError) as error:
        raise SprintError(f"{path}: not statistics of pictures: {said(error)}") from error
    return RealStatistics(statistics.mean, covariance, about.get("network"), size, statistics.count)


def _read_npz(path: Path) -> RealStatistics:
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise SprintError(f"{path}: expected arrays mu [D] and sigma [D, D] ({said(error)})") from error
    square = mean.ndim == 1 and covariance.shape == (len(mean), len(mean))
    if not square or not (mean.isfinite().all() and covariance.isfinite().all()):
        raise SprintError(
            f"{path}: expected finite mu [D] and sigma [D, D], found {[*mean.shape]} and {[*covariance.shape]}"
        )
    return RealStatistics(mean, covariance)


# ---- features of files ------------------------------------------------------------------------------


def read_picture(path: Path, size: int | None) -> np.ndarray:
    """uint8 RGB, [size, size, 3] (`at_size`), or as large as it is for None. Raises SprintError, which names it."""
    try:
        with Image.open(path, formats=DECODERS) as image:
            rgb = to_rgb(image)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # Pillow has no list of what its decoders raise
        raise SprintError(f"{path}: cannot be read as a picture ({said(error)}); fetch it again") from error
    return np.asarray(rgb if size is None else at_size(rgb, size))


def features_of(
    files: Sequence[Path],
    network: FeatureNetwork,
    size: int | None,
    keep: Path,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Features of picture files, in their order, [N, D] float32; resumable, with a progress bar.

    size    side in pixels that they are resized to (`at_size`); None: as they are, all alike
    keep    folder of finished parts. A part is made anew where its files (path, size, time of change), the
            network's name or `size` are others. Processes share it
    group   whose processes share the work, if torch.distributed runs; None: all. The result does not depend on
            how many they are, and every one has it

    Raises in every process SprintError for a picture that cannot be read, OSError for a file that cannot be written.
    """
    if not files:
        raise SprintError("features: no pictures")
    parts = [
        _Part(keep, start, files[start : start + FILES_AT_ONCE], network, size)
        for start in range(0, len(files), FILES_AT_ONCE)
    ]
    rank, processes = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    missing = [k for k, part in enumerate(parts) if part.read() is None]
    if processes > 1:
        missing = _gathered(missing, group)[0]  # while others write, each would see another list
    problem = None
    try:
        _make([parts[k] for k in missing[rank::processes]], network, size, quiet=rank > 0)
    except (SprintError, OSError) as error:
        problem = error
    problems = [problem] if processes == 1 else _gathered(problem, group)
    if found := next(filter(None, problems), None):
        raise found
    return torch.cat([part.made() for part in parts])


class _Part:
    """Some of the files, and the file with their features."""

    def __init__(
        self, keep: Path, start: int, files: Sequence[Path], network: FeatureNetwork, size: int | None
    ):
        self.file, self.files = keep / f"features-{start:07d}.safetensors", files
        states = [(os.path.abspath(file), os.stat(file)) for file in files]
        facts = [network.name, size, [(path, state.st_size, state.st_mtime_ns) for path, state in states]]
        self._made_from = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def read(self) -> Tensor | None:
        """[n, D] as they were written; None if they are not here or of something else."""
        try:
            with safe_open(self.file, "pt") as kept:
                same = (kept.metadata() or {}).get("made_from") == self._made_from
                return kept.get_tensor("features") if same else None
        except (FileNotFoundError, SafetensorError):
            return None

    def made(self) -> Tensor:
        features = self.read()
        if features is None:
            raise SprintError(
                f"{self.file}: not here, though it was made; give a folder that all processes share"
            )
        return features

    def write(self, features: Tensor) -> None:
        write_whole(self.file, save({"features": features.contiguous()}, {"made_from": self._made_from}))


def _gathered(own: object, group: dist.ProcessGroup | None) -> list:
    """Every process's, in order of rank."""
    everyones = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, own, group=group)
    return everyones


def _make(parts: Sequence[_Part], network: FeatureNetwork, size: int | None, quiet: bool) -> None:
    total = sum(len(part.files) for part in parts)
    with (
        ThreadPoolExecutor(READERS) as pool,
        tqdm(total=total, desc="features", unit=" pictures", leave=False, disable=quiet or None) as bar,
    ):
        pictures = _read_ahead(pool, chain.from_iterable(part.files for part in parts), size)
        for part in parts:
            batches = []
            for start in range(0, len(part.files), BATCH):
                names = part.files[start : start + BATCH]
                batches.append(network(_stacked(list(islice(pictures, len(names))), names)))
                bar.update(len(names))
            part.write(torch.cat(batches))


def _read_ahead(pool: ThreadPoolExecutor, files: Iterable[Path], size: int | None) -> Iterator[np.ndarray]:
    waiting = deque()
    for file in files:
        waiting.append(pool.submit(read_picture, file, size))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _stacked(pictures: Sequence[np.ndarray], names: Sequence[Path]) -> np.ndarray:
    for picture, name in zip(pictures, names, strict=True):
        if picture.shape != pictures[0].shape:
            sizes = " and ".join(f"{p.shape[1]}×{p.shape[0]}" for p in (pictures[0], picture))
            raise SprintError(f"{name}: pictures of {sizes} px in one set; give a size to resize them to")
    return np.stack(pictures)
