import copy

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from sprint.maths.trigflow import HALF_PI
from sprint.models.teacher import DENSE_TIME, SPARSE_TIME
from sprint.models.view import TrigFlowView
from sprint.train.start import calibrated, fit_dense_time, measure_qk_rms, with_ones
from tests.tiny import QK_NORM, same, tiny_batch, tiny_network
from tests.tolerance import near, of_network

NORMS = [f"transformer_blocks.{i}.attn{j}.norm_{x}.weight" for i in (0, 1) for j in (1, 2) for x in "qk"]
FEATURES = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
RMS = 4.0  # of the teacher's q and k, about: QK-norm at ones divides them by it


def make_teacher():
    """Sparse time, no QK-norm, with q and k far from unit size and an embedding smooth in time."""
    teacher = tiny_network(qk_norm=False)
    make_smooth(teacher.time_embed.emb.timestep_embedder)
    for name, p in teacher.named_parameters():
        if ".to_q.weight" in name or ".to_k.weight" in name:
            p.data *= RMS
    return teacher


def make_smooth(embedder):
    """As trained ones are: the fast sinusoids weigh little."""
    frequency = torch.logspace(0, -4, 128).repeat(2)
    embedder.linear_1.weight.data *= 1 / (1 + (100 * frequency) ** 2)


def calibration_batches(count: int = 2):
    for i in range(count):
        batch = tiny_batch(8, seed=i)
        t_fm = torch.rand(8, generator=torch.Generator().manual_seed(i))
        yield batch.latent, t_fm, batch


@torch.no_grad()
def difference(network, teacher) -> float:
    """Relative, of F in dense time from the teacher's in sparse time, on a batch not calibrated on."""
    x_hat, text, mask = tiny_batch(16, seed=9)
    t = torch.linspace(0.02, HALF_PI, 16)
    F = TrigFlowView(teacher, SPARSE_TIME)(x_hat, t, text, mask)
    return ((TrigFlowView(network, DENSE_TIME)(x_hat, t, text, mask) - F).norm() / F.norm()).item()


def test_with_ones_adds_the_norms_at_one_and_copies_the_rest():
    teacher = make_teacher()
    adapted = with_ones(teacher)
    added = adapted.state_dict().keys() - teacher.state_dict().keys()
    assert sorted(added) == sorted(NORMS)
    assert all((adapted.get_parameter(name) == 1).all() for name in added)
    assert same({key: adapted.state_dict()[key] for key in teacher.state_dict()}, teacher.state_dict())
    assert adapted.config.qk_norm == QK_NORM and not adapted.config.guidance_embeds
    count = sum(p.numel() for p in adapted.parameters()) - sum(p.numel() for p in teacher.parameters())
    assert count == 8 * 32


def test_with_ones_shares_no_memory_with_the_teacher():
    teacher = make_teacher()
    adapted = with_ones(teacher)
    before = teacher.proj_out.weight.clone()
    adapted.proj_out.weight.data.zero_()
    assert torch.equal(teacher.proj_out.weight, before)


def test_measured_rms_is_the_mean_over_tokens_of_every_batch():
    teacher = make_teacher()
    rms = measure_qk_rms(teacher, calibration_batches(1), SPARSE_TIME)
    assert sorted(rms) == sorted(NORMS)

    seen = []
    handle = teacher.transformer_blocks[1].attn2.to_q.register_forward_hook(
        lambda m, a, out: seen.append(out)
    )
    x_fm, t_fm, batch = next(iter(calibration_batches(1)))
    with torch.no_grad():
        TrigFlowView(teacher, SPARSE_TIME).flow_velocity(x_fm, t_fm, batch.text, batch.mask)
    handle.remove()
    by_hand = (seen[0] ** 2).mean(dim=2).sqrt().mean()
    assert rms["transformer_blocks.1.attn2.norm_q.weight"] == near(by_hand.item(), of_network(teacher))

    both = measure_qk_rms(teacher, calibration_batches(2), SPARSE_TIME)
    assert both != rms
    assert not any(module._forward_hooks for module in teacher.modules())


def test_calibrated_norms_are_the_measured_rms_and_the_teacher_is_untouched():
    teacher = make_teacher()
    before = copy.deepcopy(teacher.state_dict())
    adapted = calibrated(teacher, calibration_batches())
    rms = measure_qk_rms(teacher, calibration_batches(), SPARSE_TIME)
    for name in NORMS:
        weight = adapted.get_parameter(name)
        torch.testing.assert_close(weight.data, torch.full_like(weight, rms[name]))
    assert same(before, teacher.state_dict())


def test_calibrated_starts_much_closer_to_the_teacher_than_ones():
    teacher = make_teacher()
    ones = difference(with_ones(teacher), teacher)
    ours = difference(calibrated(teacher, calibration_batches()), teacher)
    print(f"ones {ones:.3f}, calibrated {ours:.3f}")
    assert ones > 0.1
    assert ours < ones / 3


def test_a_dense_teacher_keeps_its_time_embedder():
    teacher = make_teacher()
    adapted = calibrated(teacher, calibration_batches(), time_scale=DENSE_TIME)
    embedder = "time_embed.emb.timestep_embedder."
    for key in (f"{embedder}linear_1.weight", f"{embedder}linear_2.bias"):
        assert torch.equal(adapted.state_dict()[key], teacher.state_dict()[key])


def wide_embedder(seed: int = 0):
    """As wide as the built-in tiny family's."""
    embedder = tiny_network(
        seed, num_attention_heads=4, attention_head_dim=32
    ).time_embed.emb.timestep_embedder
    make_smooth(embedder)
    return embedder


@pytest.mark.slow
def test_the_dense_time_fit_is_close_between_its_own_points_too():
    embedder = wide_embedder()
    sparse = copy.deepcopy(embedder)
    reported = fit_dense_time(embedder, FEATURES, SPARSE_TIME)
    t = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fitted, wanted = embedder(FEATURES(t)), sparse(FEATURES(SPARSE_TIME * t))
        spread = (wanted - wanted.mean(0)).norm()
    error = ((fitted - wanted).norm() / wanted.norm()).item()
    assert reported < 0.1
    assert error == pytest.approx(reported, rel=0.2)  # not rounding: other points of the same curve
    assert (fitted - wanted).norm() < 0.25 * spread  # a constant gives 1


@pytest.mark.slow
def test_the_time_derivative_of_a_dense_fit_is_not_a_thousandfold():
    """Sparse time with dense weights copied is the paper's collapse: derivatives above 10³."""
    embedder = wide_embedder()
    t = torch.linspace(0.05, 0.95, 200)

    def speed(embedder, scale):
        _, derivative = torch.func.jvp(lambda t: embedder(FEATURES(scale * t)), (t,), (torch.ones_like(t),))
        return derivative.norm(dim=1).median().item()

    rough = tiny_network(3, num_attention_heads=4, attention_head_dim=32).time_embed.emb.timestep_embedder
    sparse = speed(rough, SPARSE_TIME)
    assert sparse > 500 * speed(rough, DENSE_TIME)
    fit_dense_time(embedder, FEATURES, SPARSE_TIME)
    assert speed(embedder, DENSE_TIME) < sparse / 20


@pytest.mark.slow
def test_the_fit_keeps_the_embedder_as_calm_as_it_was():
    """Against a jolt of every weight by a learning rate's worth: a fan of steep hinges moved by a fifth."""
    embedder = wide_embedder()
    t = torch.linspace(0, 1, 500)
    fit_dense_time(embedder, FEATURES, SPARSE_TIME)
    with torch.no_grad():
        before = embedder(FEATURES(t))
        generator = torch.Generator().manual_seed(0)
        for p in embedder.parameters():
            p += 4e-4 * torch.randn(p.shape, generator=generator).sign()
        moved = (embedder(FEATURES(t)) - before).norm() / before.norm()
    assert moved < 0.02


def test_padding_is_not_measured():
    """The same text with more padding gives the same norms."""
    x_fm, t_fm, batch = next(iter(calibration_batches(1)))
    longer = batch._replace(
        text=torch.cat([batch.text, 9 * torch.ones_like(batch.text)], 1),
        mask=torch.cat([batch.mask, torch.zeros_like(batch.mask)], 1),
    )
    teacher = tiny_network(qk_norm=False)
    short, long = (measure_qk_rms(teacher, [(x_fm, t_fm, b)], SPARSE_TIME) for b in (batch, longer))
    assert short == {name: near(value, of_network(teacher)) for name, value in long.items()}


def test_a_teacher_with_qk_norm_keeps_its_own():
    teacher = tiny_network(qk_norm=True)
    batch = tiny_batch(4)
    adapted = calibrated(teacher, [(batch.latent, torch.full((4,), 0.5), batch)])
    for name, weight in teacher.named_parameters():
        if ".norm_q." in name or ".norm_k." in name:
            assert torch.equal(adapted.get_parameter(name), weight)


def test_without_qk_norm_nothing_is_added_and_time_is_fitted_all_the_same():
    teacher = make_teacher()
    plain = with_ones(teacher, qk_norm=False)
    assert plain.state_dict().keys() == teacher.state_dict().keys() and plain.config.qk_norm is None
    adapted = calibrated(teacher, calibration_batches(), qk_norm=False)
    assert adapted.state_dict().keys() == teacher.state_dict().keys()
    assert difference(adapted, teacher) < difference(plain, teacher) / 3


def test_a_teacher_with_norms_keeps_them_whatever_is_asked():
    normed = with_ones(make_teacher())
    assert with_ones(normed, qk_norm=False).config.qk_norm == QK_NORM
