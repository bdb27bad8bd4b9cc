"""What only a CUDA device can show: the same numbers as on the CPU, and bf16 updates that learn.

`python -m tools.gpu` runs them and counts a skip as a failure.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import SanaTransformer2DModel

from sprint.data.batch import Batch
from sprint.engine import checkpoint
from sprint.engine.engine import Engine
from sprint.maths.dual import value_and_tangent
from sprint.models.families import load_family
from sprint.models.sana.presets import transformer_config
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Recipe
from sprint.sample.generate import StudentGenerator
from sprint.train.distill import DISCRIMINATOR, GENERATOR, DistillStage
from tests.tolerance import of_network

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BATCH, TOKENS, SHAPE = 4, 12, (8, 8, 8)


def reset_accelerate() -> None:
    """accelerate fixes its precision once per process unless it is reset."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def plain_float32_and_a_fresh_engine(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    reset_accelerate()
    yield
    reset_accelerate()


def random_network(**traits: bool) -> SanaTransformer2DModel:
    """The tiny preset, no two weights equal."""
    torch.manual_seed(0)
    network = SanaTransformer2DModel(**transformer_config("tiny", qk_norm=True, **traits)).eval()
    for name, p in network.named_parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        p.data = scale * torch.randn_like(p) + ("norm" in name)
    return network


def random_batch(device: torch.device, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(BATCH, *SHAPE, generator=generator)
    text = torch.randn(BATCH, TOKENS, 128, generator=generator)
    mask = (torch.arange(TOKENS) < torch.tensor([[3], [12], [7], [1]])).long()
    return Batch(latent.to(device), text.to(device), mask.to(device))


def make_stage(*overrides: str) -> DistillStage:
    recipe: Recipe = load_recipe("recipes/tiny.yaml", [f"distill.batch_size={BATCH}", *overrides])
    engine = Engine(recipe.precision)
    assert engine.device.type == "cuda"
    _, text, mask = random_batch(engine.device, seed=2)
    return DistillStage(recipe, engine, random_network(), (text[3:], mask[3:]), SHAPE)


def test_value_and_tangent_equal_the_cpu():
    def on(device: torch.device) -> list[torch.Tensor]:
        view = TrigFlowView(random_network(guidance_embeds=True).to(device), DENSE_TIME)
        x_hat, text, mask = random_batch(device)
        t = torch.tensor([0.1, 0.7, 1.2, math.pi / 2], device=device)
        guidance = torch.full((BATCH,), 4.5, device=device)

        def F(x_hat, t):
            return view(x_hat, t, text, mask, guidance)

        pair = value_and_tangent(F, x_hat, t, x_hat.roll(1, dims=0), torch.cos(t) * torch.sin(t))
        return [tensor.detach().cpu() for tensor in pair]

    for here, there in zip(on(CPU), on(CUDA), strict=True):
        assert here.norm() > 1
        assert (there - here).norm() < of_network(
            random_network(guidance_embeds=True), passes=2
        ) * here.norm()


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_bf16_updates_are_finite_and_reach_every_parameter(checkpointing):
    stage = make_stage("precision=bf16", f"activation_checkpointing={checkpointing}")
    batch = random_batch(CUDA)
    trained = {GENERATOR: stage.student, DISCRIMINATOR: stage.heads}
    for step in range(4):
        before = [p.detach().clone() for p in trained[stage.phase(step)].parameters()]
        means = stage.update(step, batch).read(stage.engine)
        assert all(map(math.isfinite, means.values())), means
        assert means["skipped"] == 0 < means["grad_norm"]
        after = dict(trained[stage.phase(step)].named_parameters())
        assert [name for name, p in after.items() if p.grad is None] == []
        assert any((p != old).any() for p, old in zip(after.values(), before, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "came"])
def test_an_update_does_not_wait_for_the_device(kind):
    """CUDA itself raises where the host would wait: in G, D, and once more, without a finite gradient."""
    betas = "[0.9,0.99]" if kind == "adamw" else "[0.9,0.999,0.9999]"
    names = ("distill.optimizer", "distill.adversarial.optimizer")
    stage = make_stage(*(f"{name}.{item}" for name in names for item in (f"kind={kind}", f"betas={betas}")))
    batch, means = random_batch(CUDA), []
    bad = batch._replace(latent=torch.full_like(batch.latent, math.nan))
    for step in range(2):  # cuDNN and cuBLAS may wait when they are first used
        stage.update(step, batch)
    stage.clock.restart()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 6):
            means.append(stage.update(step, bad if step == 4 else batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [each.read(stage.engine)["skipped"] for each in means] == [0, 0, 1, 0]
    times = stage.clock.read()
    assert times["optimizer"] > 0 and all(map(math.isfinite, times.values()))


def test_bf16_follows_fp32():
    def first_losses(precision: str) -> list[float]:
        stage, batch = make_stage(f"precision={precision}"), random_batch(CUDA)
        losses = [stage.update(step, batch).read(stage.engine)["loss"] for step in range(2)]
        reset_accelerate()
        return losses

    assert first_losses("bf16") == pytest.approx(first_losses("fp32"), rel=0.1, abs=0.1)


def test_a_checkpoint_of_the_device_goes_on_where_it_was(tmp_path):
    """Not bit for bit: some CUDA kernels add in no fixed order."""
    batches = [random_batch(CUDA, seed) for seed in range(6)]
    whole = make_stage()
    for step in range(2):
        whole.update(step, batches[step])
    saver = checkpoint.Saver(tmp_path)
    saver.save("distill-2", whole.tensors(), whole.facts())
    saver.wait()
    resumed, newest = make_stage(), checkpoint.latest(tmp_path)
    resumed.load(partial(checkpoint.read_tensors, newest), checkpoint.read_facts(newest))
    for step in range(2, 6):
        losses = [stage.update(step, batches[step]).read(stage.engine)["loss"] for stage in (whole, resumed)]
        assert losses[1] == pytest.approx(losses[0], rel=0.01, abs=0.01)


def test_one_step_pictures_equal_the_cpu():
    def on(device: torch.device) -> np.ndarray:
        family = load_family("tiny", max_length=32, instruction=False).to(device)
        network = random_network(guidance_embeds=True).to(device)
        return StudentGenerator(TrigFlowView(network, DENSE_TIME), family).pictures(
            ["a red circle", "two blue squares"], [3, 4], 1
        )

    here, there = on(CPU).astype(int), on(CUDA).astype(int)
    assert here.std() > 5
    assert np.abs(here - there).max() <= 3
