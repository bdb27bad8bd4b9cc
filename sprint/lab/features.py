"""A feature network of our own for the built-in scenes: what FID and KID see of a 64×64 picture.

A small convolutional network that `tools/make/scene_features.py` trained on rendered scenes to say which shape
and colour covers each cell, how many there are of each, and how far outlines are ragged, colours mixed, edges
blurred. Its weights and training record lie in `sprint/lab/scene_features`.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sprint.base.errors import SprintError
from sprint.base.files import sha256
from sprint.lab.scenes import SIZE

ASSETS = Path(__file__).parent / "scene_features"
WEIGHTS, RECORD = ASSETS / "weights.safetensors", ASSETS / "training.json"

CHANNELS = (3, 32, 64, 96, 96, 96)  # of the picture, then of each 5×5 or 3×3 convolution
STRIDES = (2, 2, 1, 2, 1)  # an eighth of the picture's side in all
FEATURES = 64
LARGEST_BATCH = 128  # pictures in one forward


def scene_backbone(batch_norm: bool = False) -> nn.Sequential:
    """Pictures [B, 3, 64, 64] in [-1, 1]  -> cells [B, FEATURES, 8, 8], none below 0; each sees 41 pixels.

    batch_norm   after every convolution but the last, for training; stored weights have it folded in
    """
    layers: list[nn.Module] = []
    for i, stride in enumerate(STRIDES):
        kernel = 5 if i == 0 else 3
        layers.append(
            nn.Conv2d(CHANNELS[i], CHANNELS[i + 1], kernel, stride, kernel // 2, bias=not batch_norm)
        )
        if batch_norm:
            layers.append(nn.BatchNorm2d(CHANNELS[i + 1]))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Conv2d(CHANNELS[-1], FEATURES, 1), nn.ReLU())


def scale_pictures(pictures: Tensor) -> Tensor:
    """uint8 or float [B, H, W, 3] from 0 to 255  -> float32 [B, 3, H, W] from -1 to 1, channels last"""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


class SceneFeatures:
    """A `FeatureNetwork`: uint8 [B, 64, 64, 3]  -> features [B, 64], float32 on the CPU.

    The penultimate activations, averaged over the picture's 8×8 cells and divided by their standard deviation over
    real scenes. Few numbers, because FID of two finite samples of the same pictures grows with the square of their
    count and drowns what is to be measured: 600 real scenes against 3000 others give 0.86 here, the same with an
    object missing from one in twenty 1.07, from one in five 2.56, with outlines moved by a pixel 15.

    name   as it stands beside a figure; other weights have another one
    """

    def __init__(self, backbone: nn.Module, device: torch.device | str = "cpu", name: str = "scene network"):
        self.backbone = backbone.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.device, self.name = device, name

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray) -> Tensor:
        """Features of a picture do not depend on its batch. Raises SprintError for any other array."""
        if pictures.ndim != 4 or pictures.shape[1:] != (SIZE, SIZE, 3) or pictures.dtype != np.uint8:
            raise SprintError(
                f"scene features: got {pictures.dtype} {list(pictures.shape)}; give uint8 [B, {SIZE}, {SIZE}, 3]"
            )
        parts = torch.from_numpy(pictures).split(LARGEST_BATCH)
        cells = [self.backbone(scale_pictures(part.to(self.device))) for part in parts]
        return torch.cat([part.mean((2, 3)).cpu() for part in cells])


def scene_features(device: torch.device | str = "cpu", weights: Path = WEIGHTS) -> SceneFeatures:
    """The network that comes with the package. Raises SprintError where its file is damaged."""
    backbone = scene_backbone()
    try:
        backbone.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SprintError(f"{weights}: {reason}; install the package again") from error
    return SceneFeatures(backbone, device, f"scene network {sha256(weights)[:8]}")


def training_record() -> dict:
    """How the network was trained, how well it reads held-out scenes, and what FID it gives: training.json."""
    return json.loads(RECORD.read_text(encoding="utf-8"))
