"""Pictures from prompts and seeds: students in a few steps, teachers in many, with one signature.

A picture depends on its prompt and its seed, not on the batch it is drawn in.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sprint.base.door import shown
from sprint.base.errors import SprintError
from sprint.base.finite import is_finite
from sprint.base.products import use_products
from sprint.base.random import on_device
from sprint.maths.samplers import Noise, Trace, sample_consistency, sample_ode, trace_ode
from sprint.maths.schedule import check_times, student_times, teacher_times
from sprint.models.encoders import TEXT_UNIT, Family, encode_null
from sprint.models.guidance import GuidedText, guided_velocity, with_null
from sprint.models.teacher import TextMemory
from sprint.models.view import TrigFlowView
from sprint.recipe.settings import GUIDANCE, SEEDS
from sprint.weights.settings import STUDENT_STEPS

LARGEST = 16_384  # pixels a side: four times what any public network was trained for
# graphs of one network, at most: one for each size, number of pictures and length of text
COMPILED_KINDS = 256
# tokens: texts are padded to multiples of it, since each length is compiled anew
COMPILED_TEXT_UNIT = 64


class Generator:
    """What students and teachers share; use `StudentGenerator` or `TeacherGenerator`.

    view        the network seen through TrigFlow, put in evaluation mode
    family      text side and autoencoder, on the network's device
    size        pixels a side where a call names none; by default the network's own
    own_times   lists of times that take the place of a student's default ones, at most one for a number of steps
    """

    default_steps: int  # of a call that names neither steps nor times

    def __init__(
        self,
        view: TrigFlowView,
        family: Family,
        size: int | None = None,
        own_times: Sequence[Sequence[float]] = (),
    ):
        self.view = use_products(view.eval())
        view.teacher.lay_out(view.network)
        self.family = family
        self.own_times = {len(times) - 1: list(times) for times in own_times}
        self.size = size or view.sizes.side * family.downscale
        self.text_unit = TEXT_UNIT
        self.memory: TextMemory | None = view.teacher.text_memory(view.network)
        # entered around "text", "network" and "decoder"; whoever times them sets it to a `Clock`'s
        self.part: Callable[[str], AbstractContextManager] = nullcontext

    def compile(self) -> "Generator":
        """Compile network and decoder in place; on CUDA as graphs, and the text encoder too.  -> self

        The first pictures of each size, number and length of text then take minutes, and later ones less time.
        What a graph gives lives until its next run: it is copied at once, by `Family._encode` and the samplers.
        """
        self.memory = None  # a graph has no place for it
        parts = [self.view.network, self.family.autoencoder.decoder]
        if self.family.device.type == "cuda":
            parts.append(self.family.text_encoder)
        for part in parts:
            mode = "max-autotune" if self.family.device.type == "cuda" else "default"
            part.compile(fullgraph=True, dynamic=False, mode=mode)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_KINDS)
        self.text_unit = COMPILED_TEXT_UNIT
        return self

    def __call__(
        self,
        prompts: str | Sequence[str],
        steps: int | None = None,
        seeds: int | Sequence[int] = 0,
        guidance: float = 4.5,
        size: int | None = None,
        times: list[float] | None = None,
    ) -> list[Image.Image]:
        """One RGB picture for each prompt; `pictures` has them as an array, and says more of the arguments.

        prompts   several, or one as text
        steps     1 to 4 for a student (default 2), any number for a teacher (default 20)
        seeds     one for each prompt, or the first picture's, from which the next ones count up

        Raises SprintError for an empty prompt and whatever else cannot be drawn.

            sprint.load("runs/tiny/student")(["a red circle", "a blue square"], steps=1, seeds=[3, 8])
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [seeds + i for i in range(len(prompts))] if isinstance(seeds, int) else list(seeds)
        if steps is None and times is None:
            steps = self.default_steps
        return [Image.fromarray(one) for one in self.pictures(prompts, seeds, steps, guidance, size, times)]

    def pictures(
        self,
        prompts: list[str],
        seeds: list[int],
        num_inference_steps: int | None = None,
        guidance_scale: float = 4.5,
        size: int | None = None,
        times: list[float] | None = None,
    ) -> np.ndarray:
        """One picture for each prompt and its seed.  -> uint8 [B, size, size, 3]

        num_inference_steps   network steps, with the default times; may be left out where `times` is given
        guidance_scale        embedded by a student, applied by a teacher; at least 0
        size                  pixels a side, a multiple of the autoencoder's and the network's cell
        times                 TrigFlow times in radians from at most π/2 down to 0, one more than steps

        Raises SprintError for an empty prompt and whatever else cannot be drawn. Prompts longer than the
        text encoder reads are cut with a warning.
        """
        with torch.inference_mode():
            latents = self.latents(prompts, seeds, num_inference_steps, guidance_scale, size, times)
            with self.part("decoder"):
                return self.family.decode_latents(latents)

    @torch.no_grad()
    def latents(
        self,
        prompts: list[str],
        seeds: list[int],
        num_inference_steps: int | None = None,
        guidance_scale: float = 4.5,
        size: int | None = None,
        times: list[float] | None = None,
    ) -> Tensor:
        """As `pictures`, before the autoencoder.  -> unit-scale latents [B, C, h, w], float32

        Raises SprintError also where text encoder or network gives values that are not finite.
        """
        _check_prompts(prompts, seeds)
        if not GUIDANCE.holds(guidance_scale):
            raise SprintError(f"guidance {guidance_scale}: give a number {GUIDANCE.words}")
        times = self.times(num_inference_steps, times)
        noise = Noise(seeds, self._latent_shape(self.size if size is None else size), self.family.device)
        with self.part("text"):
            text, mask = self.family.encode_trimmed(prompts, self.text_unit)
        _check_values("text encoder", text, prompts)
        scales = torch.full((len(prompts),), float(guidance_scale), device=self.family.device)
        latents = self.denoise(text.to(self.view.network.dtype), mask, scales, noise, times)
        _check_values("network", latents, prompts)
        return latents

    def one_text(self, text: Tensor) -> AbstractContextManager:
        """Inside, the network reads `text` once for all steps, unless it is compiled."""
        return self.memory.of(text) if self.memory else nullcontext()

    def times(self, num_inference_steps: int | None, times: list[float] | None = None) -> list[float]:
        """The checked custom list, or the default one for so many steps. Raises SprintError."""
        if times is None:
            if num_inference_steps is None:
                raise SprintError("give a number of steps or a list of times")
            return self._default_times(num_inference_steps)
        steps = len(check_times(times)) - 1
        if num_inference_steps not in (None, steps):
            raise SprintError(
                f"steps {num_inference_steps}, but the list of times makes {steps}; leave one out"
            )
        return times

    def _latent_shape(self, size: int) -> tuple[int, int, int]:
        """[C, h, w] of a picture of `size` pixels a side. Raises SprintError where it does not divide into cells."""
        unit = self.family.downscale * self.view.sizes.patch
        if size > LARGEST:
            raise SprintError(f"size {size}: pictures of at most {LARGEST:,} pixels a side are drawn")
        if size < unit or size % unit:
            below = max(size // unit, 1) * unit
            nearest = f"{below} or {below + unit}" if size > unit else f"{unit}"
            raise SprintError(f"size {size} is not a multiple of {unit} pixels; the nearest is {nearest}")
        cells = size // self.family.downscale
        return self.view.sizes.channels, cells, cells

    def _default_times(self, num_inference_steps: int) -> list[float]:
        raise NotImplementedError

    def denoise(self, text: Tensor, mask: Tensor, scales: Tensor, noise: Noise, times: list[float]) -> Tensor:
        """`latents` from text [B, T, D], mask [B, T] and guidance scales [B]."""
        raise NotImplementedError


class StudentGenerator(Generator):
    """A network that embeds guidance: one conditional forward a step, fresh noise between steps."""

    default_steps = 2

    def _default_times(self, num_inference_steps: int) -> list[float]:
        if num_inference_steps not in range(1, STUDENT_STEPS + 1):
            raise SprintError(
                f"steps {num_inference_steps}: a student takes 1 to {STUDENT_STEPS}; "
                "for any other number give a list of times, in radians from 1.5708 to 0"
            )
        return self.own_times.get(num_inference_steps) or student_times(num_inference_steps)

    def denoise(self, text: Tensor, mask: Tensor, scales: Tensor, noise: Noise, times: list[float]) -> Tensor:
        with self.part("network"), self.one_text(text):
            return sample_consistency(partial(self.view, text=text, mask=mask, guidance=scales), noise, times)


class TeacherGenerator(Generator):
    """A flow-matching network with classifier-free guidance: first-order steps along its ODE."""

    default_steps = 20

    def _default_times(self, num_inference_steps: int) -> list[float]:
        return teacher_times(num_inference_steps)

    def denoise(self, text: Tensor, mask: Tensor, scales: Tensor, noise: Noise, times: list[float]) -> Tensor:
        guided = self._guided(text, mask)
        F = partial(guided_velocity, self.view, guided=guided, guidance_scale=scales)
        with self.part("network"), self.one_text(guided.text):
            return sample_ode(F, noise, times)

    @torch.no_grad()
    def trace(
        self,
        prompts: list[str],
        text: Tensor,
        mask: Tensor,
        seeds: list[int],
        guidance: Tensor,
        times: list[float],
        size: int,
    ) -> Trace:
        """The whole way of `latents`, each picture with a guidance scale of its own: guidance [B].

        prompts   as texts, and as `Family.encode_trimmed` gives them: text [B, T, D], mask [B, T]

        -> K = len(times) − 1 states and velocities, and the latent.  Raises SprintError as `latents` does.
        """
        noise = Noise(seeds, self._latent_shape(size), self.family.device)
        _check_values("text encoder", text, prompts)
        guided = self._guided(text.to(self.view.network.dtype), mask)
        guidance = on_device(guidance, self.family.device)
        F = partial(guided_velocity, self.view, guided=guided, guidance_scale=guidance)
        with self.part("network"), self.one_text(guided.text):
            trace = trace_ode(F, noise, times)
        _check_values("network", trace.latent, prompts)
        return trace

    def _guided(self, text: Tensor, mask: Tensor) -> GuidedText:
        with self.part("text"):
            null_text, null_mask = encode_null(self.family)
        return with_null(text, mask, null_text.to(text.dtype), null_mask)


def _check_values(part: str, values: Tensor, prompts: list[str]) -> None:
    """values [B, ...] of a part of the model, one for each prompt"""
    if is_finite(values):
        return
    wrong = (~values.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    dtype = str(values.dtype).removeprefix("torch.")
    raise SprintError(
        f"the {part} gives values that are not finite ({dtype}) for {len(wrong)} of {len(prompts)} prompts, "
        f"the first {shown(prompts[wrong[0]])!r}; no picture can be made of them"
    )


def _check_prompts(prompts: list[str], seeds: list[int]) -> None:
    if not prompts:
        raise SprintError("no prompt to draw; give at least one")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise TypeError(f"prompt {number} of {len(prompts)} is no text: {prompt!r}")
        if not prompt.strip():
            raise SprintError(f"prompt {number} of {len(prompts)} is empty; say what to draw")
    if len(seeds) != len(prompts):
        raise SprintError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed for each")
    for seed in seeds:
        if not 0 <= seed < SEEDS:
            raise SprintError(f"seed {seed} is not a whole number from 0 to 2**63 - 1")
