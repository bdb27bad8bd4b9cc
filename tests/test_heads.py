import math

import pytest
import torch
import torch.nn.functional as F

from sprint.models.heads import (
    BatchNormLocal,
    DiscriminatorHead,
    DiscriminatorHeads,
    deinterleave,
    interleave,
)


@pytest.mark.parametrize(("width", "parameters"), [(1152, 13_279_105), (2240, 50_191_681)])
def test_parameter_count(width, parameters):
    with torch.device("meta"):
        heads = DiscriminatorHeads(width, count=4)
    assert parameters == 10 * width**2 + 7 * width + 1  # three convolutions with bias, two affine norms
    assert sum(p.numel() for p in heads.parameters()) == 4 * parameters


def test_logits_are_one_per_token_of_each_head_in_order():
    heads = DiscriminatorHeads(width=16, count=2).eval()
    features = [torch.randn(3, 5, 16), torch.randn(3, 7, 16)]
    logits = heads(features)
    assert logits.shape == (3, 12)
    assert torch.equal(logits[:, :5], heads.heads[0](features[0]))
    with pytest.raises(ValueError):
        heads(features[:1])


def test_head_is_the_written_formula():
    torch.manual_seed(0)
    head = DiscriminatorHead(8).double().eval()
    x = torch.randn(4, 6, 8, dtype=torch.float64)

    def normalised(y):
        mean, var = y.mean((0, 2), keepdim=True), y.var((0, 2), unbiased=False, keepdim=True)
        return (y - mean) / torch.sqrt(var + 1e-5)

    def conv(layer, y):
        weight = layer.weight  # [out, in, kernel]; position n of the ring sees n + k − kernel // 2
        reach = weight.shape[2] // 2
        shifted = [torch.roll(y, reach - k, dims=2) for k in range(weight.shape[2])]
        out = sum(torch.einsum("oi,bin->bon", weight[:, :, k], s) for k, s in enumerate(shifted))
        return out + layer.bias[:, None]

    y = F.leaky_relu(normalised(conv(head.pointwise[0], x.transpose(1, 2))), 0.2)
    y = (F.leaky_relu(normalised(conv(head.residual[0], y)), 0.2) + y) / math.sqrt(2)
    expected = conv(head.logit, y)[:, 0]
    assert torch.allclose(head(x), expected, atol=1e-12)


def test_spectral_norm_of_every_convolution_is_one():
    torch.manual_seed(0)
    head = DiscriminatorHead(32)
    for _ in range(100):
        head(torch.randn(2, 9, 32))
    for conv in (head.pointwise[0], head.residual[0], head.logit):
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1.0, abs=2e-3)


def test_local_batch_norm_uses_its_own_group_only():
    x = torch.arange(16.0).reshape(16, 1, 1).repeat(1, 2, 3) ** 2
    norm = BatchNormLocal(2, virtual_batch=8)
    y = norm(x)
    for group in (slice(0, 8), slice(8, 16)):
        assert y[group].mean().item() == pytest.approx(0, abs=1e-6)
        assert y[group].var(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    changed = x.clone()
    changed[8:] += 100 * torch.randn(8, 2, 3)
    assert torch.equal(norm(changed)[:8], y[:8])
    assert torch.equal(norm.eval()(x), y)


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1]), (7, [7]), (9, [5, 4]), (16, [8, 8]), (17, [6, 6, 5])])
def test_groups_of_a_batch_that_is_not_a_multiple(batch, sizes):
    x = torch.randn(batch, 3, 4, dtype=torch.float64)
    y = BatchNormLocal(3, virtual_batch=8).double()(x)
    means = torch.stack([group.mean((0, 2)) for group in y.split(sizes)])
    assert means.abs().max() < 1e-12
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("kinds", [2, 3])
def test_every_virtual_group_of_an_interleaved_batch_has_all_kinds(kinds):
    for batch in range(1, 41):
        labels = interleave(*[torch.full((batch,), kind) for kind in range(kinds)])
        groups = labels.tensor_split(math.ceil(len(labels) / 8))
        assert all(group.unique().numel() == kinds for group in groups)


def test_interleave_and_back():
    real, fake = torch.tensor([[1], [2]]), torch.tensor([[-1], [-2]])
    mixed = interleave(real, fake)
    assert mixed.tolist() == [[1], [-1], [2], [-2]]
    assert [part.tolist() for part in deinterleave(mixed, 2)] == [real.tolist(), fake.tolist()]


def hinge_after_training(mixed: bool) -> float:
    """150 discriminator steps on real ~ N(0, 1) and fake ~ N(1/2, 1)."""
    torch.manual_seed(0)
    heads = DiscriminatorHeads(width=32, count=1)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=2e-3, betas=(0.0, 0.99))
    for _ in range(150):
        real, fake = torch.randn(16, 16, 32), torch.randn(16, 16, 32) + 0.5
        if mixed:
            on_real, on_fake = deinterleave(heads([interleave(real, fake)]), 2)
        else:
            on_real, on_fake = heads([torch.cat([real, fake])]).chunk(2)
        loss = 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_hinge_falls_with_mixed_groups_and_cannot_without():
    assert hinge_after_training(mixed=True) < 0.05
    assert hinge_after_training(mixed=False) > 0.9


def test_frozen_changes_no_state_and_passes_gradients_to_the_features():
    torch.manual_seed(0)
    heads = DiscriminatorHeads(width=16, count=1)
    heads.heads[0].logit.bias.requires_grad_(False)
    before = {key: value.clone() for key, value in heads.state_dict().items()}
    features = torch.randn(4, 5, 16, requires_grad=True)
    with heads.frozen() as frozen:
        logits = frozen([features])
    logits.mean().backward()
    assert features.grad.norm() > 0
    assert all(p.grad is None for p in heads.parameters())
    assert all(torch.equal(before[key], value) for key, value in heads.state_dict().items())
    assert heads.training and heads.heads[0].residual[0].training
    assert [p.requires_grad for p in heads.heads[0].logit.parameters()].count(False) == 1


def test_training_forward_moves_the_power_iteration_and_the_state_dict_has_it():
    torch.manual_seed(0)
    heads = DiscriminatorHeads(width=16, count=1)
    key = "heads.0.residual.0.parametrizations.weight.0._u"
    before = heads.state_dict()[key].clone()
    features = [torch.randn(4, 5, 16)]
    heads(features)
    assert not torch.equal(before, heads.state_dict()[key])

    other = DiscriminatorHeads(width=16, count=1)
    other.load_state_dict(heads.state_dict())
    assert torch.equal(other(features), heads(features))


def test_bf16_autocast_is_close_to_float32():
    torch.manual_seed(0)
    heads = DiscriminatorHeads(width=64, count=1).eval()
    features = [torch.randn(8, 16, 64)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = heads(features).float()
    full = heads(features)
    assert (half - full).norm() < 0.02 * full.norm()
