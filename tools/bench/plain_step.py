"""sCM + LADD as published, written plainly: what `tools/bench/step.py` measures the trainer against.

The algorithm of SANA-Sprint (arXiv 2503.09641, Algorithm 1) in the way its public trainers compute it:

    sCM   the tangent by a functional JVP without gradients, then a plain forward with them; softmax attention
          by its mathematical definition in the JVP, since fused kernels have no forward mode; linear
          attention stays linear
    text  projected anew in every call; conditional and unconditional teacher in separate calls
    LADD  the backbone runs to its last block; the taps are read on the way; one call for each kind of sample
    G     sCM + weight · adversarial, one backward of the sum; the heads see fakes only
    D     hinge on real, generated and misaligned features; groups of local batch norm and misaligned pairs are
          those of sprint: `neighbours` samples with all their kinds

Networks, losses, draws and optimizers are sprint's, and the heads hold the same weights, so that the same
weights and draws give the same losses and gradients. One thing differs in substance: in the generator's phase
sprint's heads see real features between the fakes, so that local batch norm cannot hide them; the published
algorithm shows the fakes alone, which is less work. Nothing is slower than a plain program would be, and
nothing is shared, fused or skipped.
"""

import math
from collections.abc import Callable
from unittest.mock import patch

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import batch_norm, leaky_relu
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.parametrizations import spectral_norm

from sprint.data.batch import Batch
from sprint.engine.batches import to_device
from sprint.engine.engine import Engine, keep_time_in_float32
from sprint.engine.optim import build_optimizer
from sprint.maths import losses
from sprint.maths.trigflow import SIGMA_DATA, data_estimate, diffuse, expand_time
from sprint.models.discriminator import SLOPE, DiscriminatorHeads, deinterleave, interleave
from sprint.models.student import Student, from_adapted
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from sprint.recipe.schema import Precision, Recipe
from sprint.train.draws import Draws, draw


def value_and_tangent_in_two_passes(
    F: Callable[[Tensor, Tensor], Tensor], x_hat: Tensor, t: Tensor, v_x: Tensor, v_t: Tensor
) -> tuple[Tensor, Tensor]:
    """F(x_hat, t) with gradients to F's parameters, and dF = ∂F/∂x · v_x + ∂F/∂t · v_t without."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(F, (x_hat, t), (v_x, v_t))
    return F(x_hat, t), tangent


# ---- the heads, as published ------------------------------------------------------------------------


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of `virtual_batch` neighbours, without running statistics.  [B, C, N]"""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCN: Tensor, virtual_batch: int) -> Tensor:
        groups = x_BCN.split(virtual_batch)
        return torch.cat(
            [batch_norm(group, None, None, self.weight, self.bias, training=True) for group in groups]
        )


class Layer(nn.ModuleList):
    """Leaky ReLU of norm of SN-Conv1d over a ring of tokens.  [B, C, N]"""

    def __init__(self, width: int, kernel_size: int):
        padding = {"padding": kernel_size // 2, "padding_mode": "circular"}
        convolution = nn.Conv1d(width, width, kernel_size, **padding)
        super().__init__([spectral_norm(convolution), LocalBatchNorm(width)])

    def forward(self, x_BCN: Tensor, virtual_batch: int) -> Tensor:
        convolution, norm = self
        return leaky_relu(norm(convolution(x_BCN), virtual_batch), SLOPE)


class PlainHead(nn.Module):
    """f_1, then (f_9(x) + x)/√2, then SN-Conv1d(C→1, 1); f_k is a `Layer` k tokens wide."""

    def __init__(self, width: int):
        super().__init__()
        self.pointwise = Layer(width, 1)
        self.residual = Layer(width, 9)
        self.logit = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, x_BNC: Tensor, virtual_batch: int) -> Tensor:
        x = self.pointwise(x_BNC.transpose(1, 2), virtual_batch)
        x = (self.residual(x, virtual_batch) + x) / math.sqrt(2)
        return self.logit(x).squeeze(1)


class PlainHeads(DiscriminatorHeads):
    """One head per tapped block, with the weights of sprint's heads under the same names."""

    def __init__(self, width: int, count: int):
        nn.Module.__init__(self)
        self.heads = nn.ModuleList(PlainHead(width) for _ in range(count))


# ---- the step ---------------------------------------------------------------------------------------


class PlainStep:
    """Stage 2's updates on one process: even steps train the student, odd ones the heads.

    recipe    its `distill` settings, precision, seed and activation checkpointing; the whole batch at once, a
              constant learning rate, no average of the weights, no self-consistency
    adapted   the teacher's network, frozen here
    null      text [1, T, D] and mask [1, T] of the empty prompt
    hasten    what is done to the student and to the teacher; by default they stay as diffusers wrote them
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        adapted: SanaTransformer2DModel,
        null: tuple[Tensor, Tensor],
        hasten: Callable[[nn.Module], object] = lambda module: None,
    ):
        settings = recipe.distill
        self.recipe, self.settings, self.engine, self.null = recipe, settings, engine, null
        torch.manual_seed(recipe.seed)
        network = from_adapted(adapted)
        if recipe.activation_checkpointing:
            network.enable_gradient_checkpointing()
            adapted.enable_gradient_checkpointing()
        width = adapted.config.num_attention_heads * adapted.config.attention_head_dim
        with patch.object(engine, "hasten", hasten):
            self.teacher = TrigFlowView(engine.frozen(adapted), DENSE_TIME)
        self.student = Student(network).to(engine.device).train()
        hasten(self.student)
        if recipe.precision is Precision.bf16:
            keep_time_in_float32(self.student)
        self.heads = PlainHeads(width, len(settings.adversarial.taps)).to(engine.device).train()
        self.student_optimizer = build_optimizer(self.student.parameters(), settings.optimizer)
        self.heads_optimizer = build_optimizer(self.heads.parameters(), settings.adversarial.optimizer)
        self.generator_updates = 0

    def update(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One update on batch number `step`.  -> its losses, scalars on the device"""
        draws = to_device(draw(self.recipe, step, tuple(batch.latent.shape[1:])), self.engine.device)
        generator = step % 2 == 0
        part = self.student if generator else self.heads
        optimizer = self.student_optimizer if generator else self.heads_optimizer
        clip_norm = (self.settings if generator else self.settings.adversarial).optimizer.clip_norm
        optimizer.zero_grad(set_to_none=True)
        with self.engine.autocast():
            losses_of = self.generator_losses if generator else self.discriminator_losses
            seen = losses_of(batch, draws)
        seen["loss"].backward()
        clip_grad_norm_(part.parameters(), clip_norm)
        optimizer.step()
        self.generator_updates += generator
        return {name: value.detach() for name, value in seen.items()}

    # ---- generator ----------------------------------------------------------------------------------

    def generator_losses(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        scm = self.consistency_loss(batch, draws)
        adversarial = self.adversarial_loss(batch, draws)
        loss = self.settings.consistency.weight * scm + self.settings.adversarial.weight * adversarial
        return {"loss": loss, "loss_scm": scm, "loss_adv": adversarial}

    def consistency_loss(self, batch: Batch, draws: Draws) -> Tensor:
        t, x_t = draws.t, diffuse(SIGMA_DATA * batch.latent, draws.noise, draws.t)
        with torch.no_grad():
            D = self.teacher_velocity(x_t, batch, draws)

        def F_theta(x_hat, t):
            return self.student(x_hat, t, batch.text, batch.mask, draws.guidance)

        v_x, v_t = losses.tangent_inputs(t, D)
        F, F_prime = value_and_tangent_in_two_passes(F_theta, x_t / SIGMA_DATA, t, v_x, v_t)
        r = losses.tangent_warmup(self.generator_updates, self.settings.consistency.tangent_warmup_updates)
        g = losses.consistency_tangent(F.detach(), F_prime, D, x_t, t, r)
        g = losses.normalise_tangent(g, self.settings.consistency.tangent_normalisation)
        logvar = self.student.log_variance(t, draws.guidance)
        return losses.consistency_loss(F, F.detach(), g, logvar, t)

    def teacher_velocity(self, x_t: Tensor, batch: Batch, draws: Draws) -> Tensor:
        """D = σ_d · (F_u + w (F_c − F_u)), a call for each branch, each with its own mask."""
        null_text, null_mask = (part.expand(len(x_t), *part.shape[1:]) for part in self.null)
        F_c = self.teacher(x_t / SIGMA_DATA, draws.t, batch.text, batch.mask)
        F_u = self.teacher(x_t / SIGMA_DATA, draws.t, null_text, null_mask)
        return SIGMA_DATA * (F_u + expand_time(draws.guidance, F_u) * (F_c - F_u))

    def adversarial_loss(self, batch: Batch, draws: Draws) -> Tensor:
        features = self.features(self.one_step_sample(batch, draws), batch, draws)
        with self.heads.frozen():
            logits = self.heads(features, self.settings.adversarial.neighbours).float()
        return losses.generator_adversarial_loss(logits)

    # ---- discriminator ------------------------------------------------------------------------------

    def discriminator_losses(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        neighbours = self.settings.adversarial.neighbours
        with torch.no_grad():
            real = SIGMA_DATA * batch.latent
            pictures = [real, self.one_step_sample(batch, draws)]
            if self.settings.adversarial.misaligned_pairs:
                pictures.append(torch.cat([group.roll(1, dims=0) for group in real.split(neighbours)]))
            features = [self.features(x_0, batch, draws) for x_0 in pictures]
        mixed = [interleave(*kinds) for kinds in zip(*features, strict=True)]
        logits = self.heads(mixed, len(pictures) * neighbours).float()
        real_logits, *fake_logits = deinterleave(logits, len(pictures))
        return {"loss": losses.discriminator_hinge_loss(real_logits, torch.cat(fake_logits))}

    # ---- both ---------------------------------------------------------------------------------------

    def one_step_sample(self, batch: Batch, draws: Draws) -> Tensor:
        """x̂_0 = f_θ(x_t', t')."""
        x_t = diffuse(SIGMA_DATA * batch.latent, draws.start_noise, draws.start_t)
        F = self.student(x_t / SIGMA_DATA, draws.start_t, batch.text, batch.mask, draws.guidance)
        return data_estimate(x_t, F, draws.start_t)

    def features(self, x_0: Tensor, batch: Batch, draws: Draws) -> list[Tensor]:
        """Outputs of the tapped blocks of the whole frozen network on renoised x_0, [B, N, C] each."""
        t = draws.renoise_t[:, 0]  # one for all kinds, as `Renoising.shared` draws
        x_t = diffuse(x_0, draws.renoise_noise[:, 0], t)
        blocks, taken = self.teacher.network.transformer_blocks, {}

        def keep(tap: int):
            return lambda block, inputs, output: taken.update({tap: output})

        taps = self.settings.adversarial.taps
        handles = [blocks[tap].register_forward_hook(keep(tap)) for tap in taps]
        self.teacher(x_t / SIGMA_DATA, t, batch.text, batch.mask)
        for handle in handles:
            handle.remove()
        dtype = torch.promote_types(x_0.dtype, torch.float32)
        return [taken[tap].to(dtype) for tap in taps]
