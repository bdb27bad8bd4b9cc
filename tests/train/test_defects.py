"""One test for each defect of the reference trainers, named after it. Most have more tests in their own files."""

import copy
import inspect
import math
import pickle
from functools import partial

import pytest
import torch
from diffusers import SanaSprintPipeline, SCMScheduler
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from sprint.base.errors import SprintError
from sprint.engine import checkpoint, dcp
from sprint.engine.engine import Engine
from sprint.engine.held import Replicated
from sprint.maths.schedule import check_times, student_times, with_max_time
from sprint.maths.trigflow import HALF_PI, SIGMA_DATA, diffuse
from sprint.models.guidance import with_null
from sprint.models.teacher import DENSE_TIME
from sprint.recipe.schema import AdversarialLoss
from sprint.train.distill import DISCRIMINATOR, GENERATOR, DistillStage
from sprint.train.draws import draw
from sprint.train.terms import adversarial as terms
from sprint.train.terms.consistency import teacher_velocity
from sprint.weights import verify
from tests.tiny import LATENT, same, snapshot, tiny_batch, tiny_network, tiny_null, tiny_recipe
from tests.tolerance import of_network, readings

G, D = 0, 1  # steps of each phase


@pytest.fixture
def stage(engine) -> DistillStage:
    return DistillStage(tiny_recipe(), engine, tiny_network(), tiny_null(), LATENT)


def test_trig_time_is_not_cast_to_bf16_before_its_sine(bf16_engine):
    """In bf16 there are 201 times in [1, π/2]; ours stay apart, and a bf16 time is refused."""
    stage = DistillStage(tiny_recipe(), bf16_engine, tiny_network(), tiny_null(), LATENT)
    seen = []
    stage.student.network.time_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with bf16_engine.autocast():
        for term in stage.student_terms():
            term(tiny_batch(), stage.with_null(tiny_batch()), draw(stage.recipe, 0, LATENT))
    times = torch.cat(seen)
    assert times.dtype == torch.float32
    assert (times != times.bfloat16().float()).float().mean() > 0.5
    with pytest.raises(TypeError, match="must be float32 or float64"):
        diffuse(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, dtype=torch.bfloat16))


def test_a_nan_step_is_skipped_in_its_own_phase(stage):
    bad = tiny_batch()._replace(latent=torch.full((8, *LATENT), math.nan))
    stage.update(G, bad)
    assert (stage.generator.skipped, stage.discriminator.skipped) == (1, 0)
    assert [stage.phase(step) for step in (1, 2)] == [DISCRIMINATOR, GENERATOR]
    stage.update(D, bad)
    assert (stage.generator.skipped, stage.discriminator.skipped) == (1, 1)


def test_phase_randomness_and_data_position_survive_a_resume(engine, stage, tmp_path):
    """All three are functions of the step, and the step is in the checkpoint."""
    for step in range(3):
        stage.update(step, tiny_batch(seed=step))
    saver = checkpoint.Saver(tmp_path)
    saver.save("distill-3", stage.tensors(), {"step": 3, "stage": stage.facts()})
    saver.wait()
    other = DistillStage(tiny_recipe(), engine, tiny_network(), tiny_null(), LATENT)
    path = checkpoint.latest(tmp_path)
    facts = checkpoint.read_facts(path)
    other.load(partial(checkpoint.read_tensors, path), facts["stage"])
    torch.manual_seed(1234)
    for each in (stage, other):
        assert each.phase(facts["step"]) == DISCRIMINATOR
        each.update(facts["step"], tiny_batch(seed=facts["step"]))
    assert same(snapshot(stage.heads), snapshot(other.heads))
    assert same(stage.tensors(), other.tensors())


def test_max_time_is_half_pi_in_the_discriminator_phase_too(stage, monkeypatch):
    """Not the probability 0.5 itself."""
    seen = []
    original = terms.one_step_sample
    monkeypatch.setattr(
        terms, "one_step_sample", lambda s, b, draws: seen.append(draws.start_t) or original(s, b, draws)
    )
    stage.settings.adversarial.max_time_probability = 1.0
    stage.update(G, tiny_batch())
    stage.update(D, tiny_batch())
    assert len(seen) == 2
    assert all((t == torch.tensor(HALF_PI)).all() for t in seen)
    t = with_max_time(torch.full((1000,), 0.3), 0.5, torch.Generator().manual_seed(0))
    assert sorted(t.unique().tolist()) == pytest.approx([0.3, HALF_PI])


def test_misaligned_pairs_do_not_double_the_real_prompts(stage, monkeypatch):
    sizes = []
    monkeypatch.setitem(
        terms.DISCRIMINATOR_LOSSES,
        AdversarialLoss.hinge,
        lambda real, fake: sizes.append((len(real), len(fake))) or real.mean() + fake.mean(),
    )
    stage.update(D, tiny_batch())
    assert sizes == [(8, 16)]


def test_the_guidance_embedder_is_not_zero_in_both_layers(stage):
    """Its last layer learns at once, its first as soon as the last has moved."""
    embedder = stage.student.network.time_embed.guidance_embedder
    assert embedder.linear_1.weight.norm() > 0 and embedder.linear_2.weight.norm() == 0
    first = embedder.linear_1.weight.detach().clone()
    stage.update(0, tiny_batch())
    assert embedder.linear_2.weight.norm() > 0
    stage.update(2, tiny_batch())
    assert not torch.equal(first, embedder.linear_1.weight)


@torch.no_grad()
def test_the_unconditional_branch_has_its_own_mask(stage):
    batch, draws, (null_text, null_mask) = tiny_batch(), draw(stage.recipe, 0, LATENT), stage.null
    x_t = diffuse(SIGMA_DATA * batch.latent, draws.noise, draws.t)
    masks = []
    hook = stage.teacher.network.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["encoder_attention_mask"]), with_kwargs=True
    )
    ours = teacher_velocity(stage.teacher, x_t, draws, stage.with_null(batch))
    hook.remove()
    conditional, unconditional = masks[0].chunk(2)
    assert torch.equal(conditional, batch.mask)
    assert torch.equal(unconditional, null_mask.expand(8, -1))
    wrong = with_null(batch.text, batch.mask, null_text, torch.ones_like(null_mask))
    every_token = teacher_velocity(stage.teacher, x_t, draws, wrong)
    assert (ours - every_token).norm() > 1e-2 * ours.norm()


def test_the_discriminator_has_an_optimizer_of_its_own_settings(engine):
    recipe = tiny_recipe()
    recipe.distill.optimizer.lr, recipe.distill.adversarial.optimizer.lr = 1e-3, 5e-5
    recipe.distill.adversarial.optimizer.betas = (0.0, 0.99)
    stage = DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)
    groups = [u.trained.optimizer.param_groups[0] for u in (stage.generator, stage.discriminator)]
    assert [(group["lr"], group["betas"]) for group in groups] == [(1e-3, (0.9, 0.99)), (5e-5, (0.0, 0.99))]


def test_the_average_is_updated(stage):
    before = copy.deepcopy(stage.ema.shadow)
    stage.update(G, tiny_batch())
    moved = [not torch.equal(before[name], value) for name, value in stage.ema.shadow.items()]
    assert sum(moved) > len(moved) - 4  # all but the guidance embedder's first layer, behind a zero


@pytest.fixture
def one_gloo_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_tangent_passes_through_the_wrapper_that_averages_gradients(
    engine, one_gloo_process, monkeypatch
):
    """The one call of the module is DDP's, so every gradient is averaged; two real processes: test_engine.py."""
    recipe = tiny_recipe()
    recipe.micro_batch_size = 4
    plain = DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)
    monkeypatch.setattr(Engine, "replicated", lambda engine, *args: Replicated(*args))
    wrapped = DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)
    averaged = {
        "student": count_averaged(wrapped.generator.trained.call),
        "heads": count_averaged(wrapped.discriminator.trained.call),
    }
    for step in (G, D):
        read = [stage.update(step, tiny_batch()).read(engine) for stage in (plain, wrapped)]
        assert read[1] == readings(read[0], of_network(plain.student, plain.teacher, passes=4))
        assert step == D or read[1]["tangent_norm"] > 0.1
    for name, module in (("student", wrapped.student), ("heads", wrapped.heads)):
        assert sum(averaged[name]) == sum(p.numel() for p in module.parameters())


def count_averaged(wrapper: nn.parallel.DistributedDataParallel) -> list[int]:
    """A list that fills with how many numbers the wrapper averages."""
    numbers: list[int] = []

    def average(state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        numbers.append(bucket.buffer().numel())
        return default_hooks.allreduce_hook(None, bucket)

    wrapper.register_comm_hook(None, average)
    return numbers


def test_four_step_sampling_works_with_default_times():
    """diffusers' own defaults fail at any number of steps but two."""
    default = inspect.signature(SanaSprintPipeline.__call__).parameters["intermediate_timesteps"].default
    with pytest.raises(ValueError, match="Intermediate timesteps"):
        SCMScheduler().set_timesteps(4, intermediate_timesteps=default)
    for steps in (1, 2, 3, 4):
        assert len(check_times(student_times(steps))) == steps + 1


def test_attention_has_a_forward_derivative(stage):
    """Flash and efficient kernels have none: the tangent would be an error, or zero."""
    batch = tiny_batch()
    seen = stage.consistency_term(batch, stage.with_null(batch), draw(stage.recipe, 0, LATENT))[1]
    assert seen["tangent_norm"] > 0.1


def test_a_conversion_is_checked_by_numbers(stage, monkeypatch):
    """Right keys with a wrong velocity do not pass."""
    network = stage.teacher.network
    v = verify.own_velocity(network, DENSE_TIME, torch.float32)
    error = verify.velocity_error(v, network, DENSE_TIME, torch.float32)
    assert error <= verify.TOLERANCE[torch.float32]
    monkeypatch.setattr(verify, "to_flow_velocity", lambda F, x_fm, t_fm: F)
    with pytest.raises(SprintError, match="certificate failed"):
        verify.velocity_error(v, network, DENSE_TIME, torch.float32)


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_an_untrusted_pickle_is_not_executed(tmp_path, capsys):
    """The library's index of a checkpoint is one."""
    saver = checkpoint.Saver(tmp_path)
    saver.save("adapt-1", {"weights.w": torch.ones(1)}, {"step": 1})
    saver.wait()
    path, pickled = checkpoint.latest(tmp_path), pickle.dumps(Malicious())
    (path / dcp.INDEX).write_bytes(pickled)
    with pytest.raises(SprintError, match="cannot read checkpoint"):
        checkpoint.read_tensors(path, {"weights.w": torch.zeros(1)})
    assert "executed" not in capsys.readouterr().out
    pickle.loads(pickled)
    assert "executed" in capsys.readouterr().out  # what plain pickle does
