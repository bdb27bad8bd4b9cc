"""How long a picture takes, by SANA-Sprint's protocol (arXiv 2503.09641, Table 2), and where the time goes.

Latency is the seconds of one call for one picture, throughput the pictures a second of calls for ten. A call begins
with prompts and ends with pictures on the host. Warm-up calls are not counted. Whoever is compared takes turns,
round by round, so that a machine whose speed drifts favours none. The paper's own figures: `sprint.evaluate.published`.
"""

import gc
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from sprint.base.clock import Clock
from sprint.base.errors import NotHereError, SprintError
from sprint.sample.generate import Generator, StudentGenerator

PARTS = ("text", "network", "decoder", "other")  # other: noise, checks, what lies between the parts
WHOLE = "whole"
FLUX = "black-forest-labs/FLUX.1-schnell"
FLUX_STEPS = 4
FLUX_SIZE = 1024  # pixels a side
FLUX_TOKENS = 256  # most that the schnell model was trained to read

# ---- figures ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Order statistics of the rounds; quartiles are interpolated."""

    median: float
    min: float
    max: float
    quartile_1: float
    quartile_3: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        low, first, median, third, high = map(float, np.quantile(values, (0, 0.25, 0.5, 0.75, 1)))
        return Spread(median, low, high, first, third)


@dataclass(frozen=True)
class Latency:
    """What one contender took at one batch size.

    seconds   by part, one figure a round, in the order of the rounds: those of `PARTS`, which add up to "whole"
    """

    name: str
    steps: int
    batch: int
    size: int
    device: str
    dtype: str
    seconds: dict[str, tuple[float, ...]]

    @property
    def rounds(self) -> int:
        return len(self.seconds[WHOLE])

    @property
    def pictures_per_second(self) -> float:
        """At the median call."""
        return self.batch / self.spread(WHOLE).median

    def spread(self, part: str) -> Spread:
        """Of a part's seconds, or the whole's."""
        return Spread.of(self.seconds[part])

    def times_faster_than(self, other: "Latency") -> Spread:
        """The other's whole over this one's, round by round. Raises ValueError for unequal numbers of rounds."""
        pairs = zip(other.seconds[WHOLE], self.seconds[WHOLE], strict=True)
        return Spread.of([theirs / ours for theirs, ours in pairs])


# ---- who is measured --------------------------------------------------------------------------------


class Draw(Protocol):
    def __call__(self, prompts: list[str], seeds: list[int], clock: Clock) -> object:
        """Draw one picture for each prompt and seed, with `clock` told where "text", "network" and "decoder" are."""


@dataclass(frozen=True)
class Contender:
    """A model and what is asked of it. `size` is in pixels a side."""

    name: str
    steps: int
    size: int
    device: torch.device
    dtype: torch.dtype
    draw: Draw


def contender(
    generator: Generator, steps: int, guidance_scale: float = 4.5, size: int | None = None
) -> Contender:
    """A student or a teacher, under that name, in so many steps with the default times.

    A teacher's null prompt is encoded in every call, as diffusers' pipeline does, and counts as text.
    """
    size = generator.size if size is None else size

    def draw(prompts: list[str], seeds: list[int], clock: Clock) -> np.ndarray:
        before, generator.part = generator.part, clock.part
        try:
            return generator.pictures(prompts, seeds, steps, guidance_scale, size)
        finally:
            generator.part = before

    name = "student" if isinstance(generator, StudentGenerator) else "teacher"
    return Contender(name, steps, size, generator.family.device, generator.view.network.dtype, draw)


def flux_contender(
    name: str = FLUX,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    steps: int = FLUX_STEPS,
    size: int = FLUX_SIZE,
) -> Contender:
    """FLUX-schnell through diffusers' own pipeline, without guidance, as its model card says.

    name   folder or hub id; nothing is downloaded (34 GB)

    Raises NotHereError where the weights are not here: the others are measured without it.
    """
    from diffusers import FluxPipeline

    try:
        pipeline = FluxPipeline.from_pretrained(
            name, torch_dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise NotHereError(
            f"FLUX-schnell left out: no {name} here; fetch it with `hf download {name}` or name its folder ({reason})"
        ) from error
    pipeline.to(device).set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def draw(prompts: list[str], seeds: list[int], clock: Clock) -> list:
        with clock.part("text"):
            text, pooled, _ = pipeline.encode_prompt(prompts, None, max_sequence_length=FLUX_TOKENS)
        with clock.part("network"):
            latents = pipeline(
                prompt_embeds=text,
                pooled_prompt_embeds=pooled,
                height=size,
                width=size,
                num_inference_steps=steps,
                guidance_scale=0.0,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
            ).images
        with clock.part("decoder"):
            z = pipeline._unpack_latents(latents, size, size, pipeline.vae_scale_factor)
            z = z / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
            return pipeline.image_processor.postprocess(pipeline.vae.decode(z, return_dict=False)[0])

    return Contender("FLUX-schnell", steps, size, pipeline.device, dtype, draw)


# ---- measuring --------------------------------------------------------------------------------------


def measure_together(
    contenders: Sequence[Contender],
    prompts: Sequence[str],
    batch_sizes: Sequence[int] = (1, 10),
    rounds: int = 10,
    warmup: int = 3,
) -> list[Latency]:
    """Every contender at every batch size, in turn, `warmup` + `rounds` times.  -> by batch size, then contender

    prompts    a call takes the first of them, from the beginning again where there are fewer than its batch
    rounds     that are counted

    Each call starts on an idle device and ends when the device has done all of it. Raises SprintError for
    nothing to measure, and whatever a contender raises.
    """
    _check(contenders, prompts, batch_sizes, rounds, warmup)
    cases = [(batch, who) for batch in batch_sizes for who in contenders]
    seconds = [{part: [] for part in (*PARTS, WHOLE)} for _ in cases]
    for turn in tqdm(range(warmup + rounds), desc="latency, rounds", leave=False):
        for (batch, who), taken in zip(cases, seconds, strict=True):
            parts = _one_call(who, list(islice(cycle(prompts), batch)))
            if turn >= warmup:
                for part, value in parts.items():
                    taken[part].append(value)
    return [
        Latency(
            name=who.name,
            steps=who.steps,
            batch=batch,
            size=who.size,
            device=device_name(who.device),
            dtype=str(who.dtype).removeprefix("torch."),
            seconds={part: tuple(values) for part, values in taken.items()},
        )
        for (batch, who), taken in zip(cases, seconds, strict=True)
    ]


def _one_call(who: Contender, prompts: list[str]) -> dict[str, float]:
    """Seconds by part, and of the whole."""
    with _undisturbed(who.device):
        clock = Clock(who.device)
        who.draw(prompts, list(range(len(prompts))), clock)
        milliseconds = clock.read()
    parts = {part: milliseconds.get(part, 0.0) / 1000 for part in PARTS}
    return parts | {WHOLE: sum(parts.values())}


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """The device is current and idle, and garbage is not collected before the end."""
    gc.disable()
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield
    finally:
        gc.enable()


def _check(
    contenders: Sequence, prompts: Sequence, batch_sizes: Sequence[int], rounds: int, warmup: int
) -> None:
    if not contenders or not prompts or not batch_sizes:
        raise SprintError(
            "latency: give at least one model and number of steps, one prompt and one batch size"
        )
    if min(batch_sizes) < 1 or rounds < 1 or warmup < 0:
        raise SprintError(
            f"latency: batch sizes {list(batch_sizes)}, {rounds} rounds and {warmup} of warm-up; "
            "batches and rounds are at least 1, warm-up at least 0"
        )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the kind of processor and the threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"
