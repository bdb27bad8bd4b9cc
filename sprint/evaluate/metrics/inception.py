"""Networks that turn pictures into the features that FID and KID compare, and the size they see them at.

`inception` is the field's: the Inception-v3 of TensorFlow's archive of 2015-12-05, pool3, 2048 features, through
pytorch-fid (github.com/mseitzer/pytorch-fid). The public evaluation of Sana and statistics files with `mu` and
`sigma` use the same, so figures compare. It resizes what it is given to 299 px itself (bilinear, half-pixel
centres, no antialias); torch-fidelity has the same weights and TensorFlow's resize, so its figures differ a little.
"""

from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from PIL import Image
from torch import Tensor, nn

from sprint.base.door import at_home
from sprint.base.errors import NotHereError, SprintError
from sprint.base.files import sha256
from sprint.data.items import said

WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_NAMES = (  # in torch hub's cache: pytorch-fid's and torch-fidelity's, the same bytes
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
)
POOL3 = 2048


class FeatureNetwork(Protocol):
    """Pictures, uint8 [B, H, W, 3]  -> features, float32 [B, D] on the CPU.

    name   printed beside the figure; another one wherever the features would be others
    """

    name: str

    def __call__(self, pictures: np.ndarray) -> Tensor: ...


def finite(features: Tensor, metric: str) -> Tensor:
    """The features themselves. Raises SprintError, which names the metric, where one is NaN or infinite."""
    if not torch.isfinite(features).all():
        raise SprintError(f"{metric}: a feature is NaN or infinite; look at the pictures it came from")
    return features


# ---- the size of the pictures -----------------------------------------------------------------------


def at_size(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resampled to `size` pixels (bilinear, antialiased), then the centre, size × size.

    As Sana's public evaluation does it to real and drawn pictures alike before Inception sees them
    (tools/metrics/pytorch-fid/compute_fid.py). Its script that computes FID alone takes 256 px, the one that draws
    and measures hands it 512 px; figures at different sizes do not compare, so the size belongs beside the figure.
    """
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


# ---- Inception --------------------------------------------------------------------------------------


def inception(weights: str | Path | None, device: torch.device | str) -> FeatureNetwork:
    """The field's network.

    weights   a local copy of `WEIGHTS_URL`; None: the one in torch hub's cache, which is downloaded if need be

    Raises NotHereError, which names what to fetch, without pytorch-fid or without weights, and SprintError for a
    file that is missing or has another SHA-256.
    """
    library = _library()
    return _Inception(_build(library, _read(_find(weights))), device)


class _Inception:
    name = "Inception-v3 2015-12-05, pool3, as in pytorch-fid"

    def __init__(self, network: nn.Module, device: torch.device | str):
        self._network, self._device = network.to(device).eval(), device

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray) -> Tensor:
        pixels_BHWC = torch.from_numpy(pictures).to(self._device)
        (pooled_BD11,) = self._network(pixels_BHWC.permute(0, 3, 1, 2).float() / 255)
        return pooled_BD11.flatten(1).float().cpu()


def _find(weights: str | Path | None) -> Path:
    if weights is not None:
        file = at_home(weights)
        if not file.is_file():
            raise SprintError(f"{file}: no such file; the Inception weights are at {WEIGHTS_URL}")
        return file
    cache = Path(torch.hub.get_dir(), "checkpoints")
    files = [cache / name for name in WEIGHTS_NAMES]
    return next((file for file in files if file.is_file()), None) or _download(files[0])


def _download(file: Path) -> Path:
    try:
        if HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(WEIGHTS_URL, str(file), hash_prefix=WEIGHTS_SHA256)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: of another hash
        raise NotHereError(
            f"Inception weights are not here ({said(error)}); fetch {WEIGHTS_URL} into {file.parent} or give its path"
        ) from error
    return file


def _read(file: Path) -> dict[str, Tensor]:
    found = sha256(file)
    if found != WEIGHTS_SHA256:
        raise SprintError(
            f"{file}: SHA-256 {found[:8]}…, but the field's Inception weights have {WEIGHTS_SHA256[:8]}…; "
            f"fetch {WEIGHTS_URL}"
        )
    return torch.load(file, map_location="cpu", weights_only=True)


def _library() -> ModuleType:
    try:
        from pytorch_fid import inception as library
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        raise NotHereError(
            f"Inception features need pytorch-fid, and the torchvision of torch {torch.__version__} ({said(error)}); "
            f"pip install 'sprint-distill[inception]'; weights: {WEIGHTS_URL}"
        ) from error
    return library


def _build(library: ModuleType, state: Mapping[str, Tensor]) -> nn.Module:
    """pytorch-fid's network. It would fetch its weights itself and unpickle whatever comes: it is handed these."""
    fetch = library.load_state_dict_from_url
    library.load_state_dict_from_url = lambda url, progress: state
    try:
        return library.InceptionV3([library.InceptionV3.BLOCK_INDEX_BY_DIM[POOL3]])
    finally:
        library.load_state_dict_from_url = fetch
