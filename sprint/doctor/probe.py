"""A few forward passes of a network on pure noise: what comes out should look like the beginning of a picture.

From noise at t = π/2 a flow-matching network predicts the clean latent x_0 = ε − v. Of a network that works its
standard deviation is about the data's, 1 in unit-scale latents, and neighbouring cells agree; noise does not. Measured
on the built-in teacher and its student: deviations 0.83 to 1.06 and correlations 0.38 to 0.66, whatever the text; asked
with the other clock 1.7 to 3.8 and −0.04 to 0.30.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.base.place import usable_device
from sprint.doctor.findings import Finding, note, ok, refused, wrong
from sprint.models.families import load_family
from sprint.models.view import TrigFlowView
from sprint.weights.checkpoint import TIMES, Checkpoint
from sprint.weights.load import build_network
from sprint.weights.settings import Settings

PROMPTS = ("a red circle", "two blue squares")
LATER = 0.8  # a time between noise and data, radians
GUIDANCE, NO_GUIDANCE = 4.5, 1.0
SMALL = 10**8  # weights; above it one picture is tried, not two
CUT = 2  # blocks, where the whole network does not fit
CELLS = 32  # a side, at most, in patches
SMALL_ENCODER = 2**30  # bytes; larger ones are not loaded, and random text takes their place
LIKE_NOISE = 0.15  # correlation of neighbouring cells
SCALES = (0.4, 2.5)  # standard deviations of a prediction in unit-scale latents
CLEARLY = 0.3  # by how much the other clock's `strangeness` must be less
NO_EFFECT = 1e-5  # relative change of the prediction: the rounding of float32 over sums of 100 numbers


@dataclass(frozen=True)
class Prediction:
    """x_0 [B, C, H, W] predicted from the noise at one time, under one clock."""

    x_0: Tensor

    @property
    def finite(self) -> bool:
        return bool(self.x_0.isfinite().all())

    @property
    def deviation(self) -> float:
        return self.x_0.std().item()

    @property
    def correlation(self) -> float:
        return neighbour_correlation(self.x_0)

    @property
    def strangeness(self) -> float:
        """0 for a smooth picture of the data's scale."""
        return abs(math.log(max(self.deviation, 1e-9))) + 1 - self.correlation


def neighbour_correlation(x: Tensor) -> float:
    """Of cells [B, C, H, W] with those right of and below them, each channel about its own mean; near 0 for noise."""
    x = x - x.mean(dim=(2, 3), keepdim=True)
    pairs = [(x[..., 1:], x[..., :-1]), (x[:, :, 1:], x[:, :, :-1])]
    both = sum((a * b).sum() for a, b in pairs)
    alone = sum((a.square().sum() * b.square().sum()).sqrt() for a, b in pairs)
    return (both / alone).item() if alone > 0 else 0.0


def probe(checkpoint: Checkpoint, folder: Path | None, settings: Settings) -> list[Finding]:
    """folder   where its text encoder is, if it is there and small enough to be loaded"""
    whole = 4 * _numbers(checkpoint) < psutil.virtual_memory().available / 2
    try:
        network = build_network(
            checkpoint, torch.float32, None if whole else min(CUT, checkpoint.sizes.depth)
        )
        text, mask, said = _texts(checkpoint, folder, settings)
    except SprintError as error:
        return [refused("forward", error)]
    probed = _Probe(TrigFlowView(network, checkpoint.time_scale), checkpoint, text, mask)
    if not whole:
        return [*probed.finite(), note("forward", f"first {CUT} blocks only: the network is too large here")]
    findings = probed.finite()
    if findings[0].do:
        return findings
    return [*findings, *probed.picture(said), *probed.clock(), *probed.text(), *probed.guidance()]


def _numbers(checkpoint: Checkpoint) -> int:
    return sum(math.prod(shape) for shape in checkpoint.network.values())


def _texts(checkpoint: Checkpoint, folder: Path | None, settings: Settings) -> tuple[Tensor, Tensor, str]:
    """Two prompts, embedded: by the model's own encoder if it is small, else random.  -> text, mask, what it is"""
    files = (folder / "text_encoder").glob("*.safetensors") if folder else ()
    size = sum(file.stat().st_size for file in files)
    if 0 < size < SMALL_ENCODER:
        family = load_family(str(folder), settings.max_length, settings.instruction)
        return *family.encode_trimmed(list(PROMPTS)), "prompts"
    text = torch.randn(2, 8, checkpoint.sizes.text_width, generator=torch.Generator().manual_seed(1))
    return text, torch.ones(2, 8, dtype=torch.int64), "random text"


class _Probe:
    """The same noise, asked in several ways."""

    def __init__(self, view: TrigFlowView, checkpoint: Checkpoint, text: Tensor, mask: Tensor):
        self.device = usable_device(None)
        self.view, self.checkpoint = view.to(self.device).eval(), checkpoint
        self.texts, self.mask = text.to(self.device), mask.to(self.device)
        count = 2 if _numbers(checkpoint) <= SMALL else 1
        sizes = checkpoint.sizes
        side = min(sizes.side, CELLS * sizes.patch)
        self.noise = torch.randn(
            count, sizes.channels, side, side, generator=torch.Generator().manual_seed(0)
        )
        self.first = self.ask()

    @torch.no_grad()
    def ask(
        self, t: float = math.pi / 2, time_scale: float | None = None, swapped=False, guidance=GUIDANCE
    ) -> Prediction:
        """swapped   the two texts change places"""
        count = len(self.noise)
        text, mask = (x.flip(0)[:count] if swapped else x[:count] for x in (self.texts, self.mask))
        x_hat, times = self.noise.to(self.device), torch.full((count,), t, device=self.device)
        scales = torch.full_like(times, guidance) if self.checkpoint.is_student else None
        view = TrigFlowView(self.view.network, time_scale or self.view.time_scale)
        F = view(x_hat, times, text, mask, scales)
        return Prediction((math.cos(t) * x_hat - math.sin(t) * F).float().cpu())

    def finite(self) -> list[Finding]:
        for t, found in ((math.pi / 2, self.first), (LATER, self.ask(LATER))):
            if not found.finite:
                return [
                    wrong(
                        "forward",
                        f"the network's output at t = {t:.2f} is not finite, though it ran in float32",
                        "the weights are broken or overflow: go back to an earlier checkpoint",
                    )
                ]
        return [ok("forward", "finite at every time tried")]

    def picture(self, said: str) -> list[Finding]:
        found = self.first
        seen = (
            f"predicted from noise in one step with {said}: deviation {found.deviation:.2f} (the data's is about 1), "
            f"neighbours correlate by {found.correlation:.2f} (noise: 0)"
        )
        if not SCALES[0] < found.deviation < SCALES[1]:
            return [
                wrong(
                    "prediction",
                    seen,
                    "the scale is wrong: latents trained on without the autoencoder's scaling_factor, "
                    "the wrong clock, or a run that diverged",
                )
            ]
        if found.correlation < LIKE_NOISE:
            return [
                wrong(
                    "prediction",
                    f"{seen}: it is noise",
                    "see whether the weights moved (--against TEACHER), whether the clock is right "
                    "(--time-scale), and whether the run diverged",
                )
            ]
        return [ok("prediction", seen)]

    def clock(self) -> list[Finding]:
        told = self.checkpoint.time
        other = next(name for name in TIMES if name != told)
        theirs = self.ask(time_scale=TIMES[other])
        better = theirs.finite and self.first.strangeness - theirs.strangeness > CLEARLY
        if better and theirs.correlation > LIKE_NOISE:
            return [
                wrong(
                    "clock",
                    f"time is {told}, as {self.checkpoint.time_scale_from} tells, but with {other} time the "
                    f"prediction looks like a picture (deviation {theirs.deviation:.2f}, neighbours "
                    f"{theirs.correlation:.2f})",
                    f"open it with --time-scale {other}; whoever samples or trains it must embed "
                    f"{'1000·t' if other == 'sparse' else 't itself'}",
                )
            ]
        return [ok("clock", f"{told} time fits better than {other} time")]

    def text(self) -> list[Finding]:
        change = _change(self.ask(swapped=True), self.first)
        if change < NO_EFFECT:
            return [
                wrong(
                    "text",
                    f"another prompt changes the prediction by {change:.1e}: the network does not read it",
                    "it was trained on empty or equal captions, or its cross-attention is broken",
                )
            ]
        return [ok("text", f"another prompt changes the prediction by {100 * change:.2g}%")]

    def guidance(self) -> list[Finding]:
        if not self.checkpoint.is_student:
            return []
        change = _change(self.ask(guidance=NO_GUIDANCE), self.first)
        said = f"guidance {NO_GUIDANCE:g} in place of {GUIDANCE:g} changes the prediction by"
        if change < NO_EFFECT:
            return [
                wrong(
                    "guidance",
                    f"{said} {change:.1e}: the guidance embedder has no effect",
                    "it was never trained: give the sCM target the guided teacher, and the student the scale that "
                    "was drawn; until then its pictures are those of guidance 1, blurred and off the prompt",
                )
            ]
        return [ok("guidance", f"{said} {100 * change:.2g}%")]


def _change(a: Prediction, b: Prediction) -> float:
    return (torch.linalg.vector_norm(a.x_0 - b.x_0) / torch.linalg.vector_norm(b.x_0)).item()
