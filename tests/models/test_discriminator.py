import math

import pytest
import torch
import torch.nn.functional as F

from sprint.base.errors import SprintError
from sprint.data.batch import parts
from sprint.models.discriminator import (
    ARRANGEMENTS,
    BatchNormLocal,
    DiscriminatorHead,
    DiscriminatorHeads,
    deinterleave,
    interleave,
    swapped,
)
from sprint.recipe.schema import NormGroups
from tests.tolerance import assert_all_close, assert_close, near, of_autocast, of_network, rounding

NEIGHBOURS = 4


@pytest.mark.parametrize(("width", "parameters"), [(1152, 13_279_105), (2240, 50_191_681)])
def test_parameter_count(width, parameters):
    with torch.device("meta"):
        heads = DiscriminatorHeads(width, count=4)
    assert parameters == 10 * width**2 + 7 * width + 1  # three convolutions with bias, two affine norms
    assert sum(p.numel() for p in heads.parameters()) == 4 * parameters


def test_logits_are_one_per_token_of_each_head_in_order():
    heads = DiscriminatorHeads(width=16, count=2).eval()
    features = [torch.randn(3, 5, 16), torch.randn(3, 7, 16)]
    logits = heads(features, 8)
    assert logits.shape == (3, 12)
    assert torch.equal(logits[:, :5], heads.heads[0](features[0], 8))
    with pytest.raises(ValueError):
        heads(features[:1], 8)


def written_head(head: DiscriminatorHead, x_BNC: torch.Tensor) -> torch.Tensor:
    """The head's formula on [B, C, N], in elementary operations."""

    def normalised(layer, y):
        mean, var = y.mean((0, 2), keepdim=True), y.var((0, 2), unbiased=False, keepdim=True)
        return (y - mean) / torch.sqrt(var + 1e-5) * layer.weight[:, None] + layer.bias[:, None]

    def conv(layer, y):
        weight = layer.weight  # [out, in, kernel]; position n of the ring sees n + k − kernel // 2
        reach = weight.shape[2] // 2
        shifted = [torch.roll(y, reach - k, dims=2) for k in range(weight.shape[2])]
        out = sum(torch.einsum("oi,bin->bon", weight[:, :, k], s) for k, s in enumerate(shifted))
        return out + layer.bias[:, None]

    y = F.leaky_relu(normalised(head.pointwise[1], conv(head.pointwise[0], x_BNC.transpose(1, 2))), 0.2)
    wide = F.leaky_relu(normalised(head.residual[1], conv(head.residual[0], y)), 0.2)
    return conv(head.logit, (wide + y) / math.sqrt(2))[:, 0]


def random_head(width: int) -> DiscriminatorHead:
    torch.manual_seed(0)
    head = DiscriminatorHead(width).double().eval()
    with torch.no_grad():
        for norm in (head.pointwise[1], head.residual[1]):
            norm.weight.uniform_(0.5, 2.0)
            norm.bias.normal_()
    return head


@pytest.mark.parametrize("tokens", [4, 6, 8, 13])
def test_head_and_its_gradients_are_those_of_the_written_formula(tokens):
    head = random_head(8)
    x = torch.randn(4, tokens, 8, dtype=torch.float64, requires_grad=True)
    wanted = [x, *head.parameters()]
    logits, expected = head(x, 4), written_head(head, x)
    assert_close(logits, expected, of_network(head))
    weights = torch.randn_like(expected)
    ours, theirs = (
        dict(enumerate(torch.autograd.grad((out * weights).sum(), wanted))) for out in (logits, expected)
    )
    assert_all_close(ours, theirs, of_network(head, passes=3, terms=4 * tokens))


def test_frozen_gradient_is_the_trained_one_and_the_features_are_left_alone():
    head = random_head(8)
    heads = DiscriminatorHeads(8, count=1).double().eval()
    heads.heads[0].load_state_dict(head.state_dict())
    x = torch.randn(9, 6, 8, dtype=torch.float64, requires_grad=True)
    kept = x.detach().clone()
    with heads.frozen():
        logits = heads([x], 8)
    (frozen,) = torch.autograd.grad(logits.square().sum(), x)
    (trained,) = torch.autograd.grad(heads([x], 8).square().sum(), x)
    assert_close(frozen, trained, of_network(head, passes=3))
    assert frozen.norm() > 0
    assert torch.equal(x.detach(), kept)


def test_fewer_tokens_than_half_the_wide_kernel_are_refused():
    with pytest.raises(SprintError, match="at least 4 tokens a picture, not 3"):
        DiscriminatorHead(8)(torch.randn(2, 3, 8), 8)


@pytest.mark.parametrize("grown", ["features", "weights"])
def test_the_backward_keeps_five_tensors_the_size_of_the_features(grown):
    head, kept = DiscriminatorHead(16), {}
    head.requires_grad_(grown == "weights")

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    bytes_of = {}
    for tokens in (64, 128):
        kept.clear()
        x = torch.randn(8, tokens, 16, requires_grad=grown == "features")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = head(x, 8)
        bytes_of[tokens] = sum(kept.values())
        assert logits.requires_grad
    assert (bytes_of[128] - bytes_of[64]) / (4 * 8 * 64 * 16) == pytest.approx(5, rel=0.02)


def test_names_and_shapes_that_checkpoints_hold():
    shapes = {name: tuple(value.shape) for name, value in DiscriminatorHeads(6, count=1).state_dict().items()}
    norm = "parametrizations.weight"
    expected = {}
    for layer, out, kernel in (("pointwise.0", 6, 1), ("residual.0", 6, 9), ("logit", 1, 1)):
        expected |= {
            f"{layer}.bias": (out,),
            f"{layer}.{norm}.original": (out, 6, kernel),
            f"{layer}.{norm}.0._u": (out,),
            f"{layer}.{norm}.0._v": (6 * kernel,),
        }
    for layer in ("pointwise.1", "residual.1"):
        expected |= {f"{layer}.weight": (6,), f"{layer}.bias": (6,)}
    assert shapes == {f"heads.0.{name}": shape for name, shape in expected.items()}


def test_spectral_norm_of_every_convolution_is_one():
    torch.manual_seed(0)
    head = DiscriminatorHead(32)
    for _ in range(100):
        head(torch.randn(2, 9, 32), 8)
    for conv in (head.pointwise[0], head.residual[0], head.logit):
        # not rounding: how far the power iteration is from its end after 100 steps
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1.0, abs=2e-3)


def test_local_batch_norm_uses_its_own_group_only():
    x = torch.arange(16.0).reshape(16, 1, 1).repeat(1, 3, 2) ** 2
    norm = BatchNormLocal(2)
    y = norm(x, 8)
    for group in (slice(0, 8), slice(8, 16)):
        away = (x[group].abs().max() / x[group].std()).item()  # what is subtracted, in deviations
        assert y[group].mean().item() == near(0, rounding(torch.float32, terms=48), scale=away)
        assert y[group].var(unbiased=False).item() == near(1, rounding(torch.float32, terms=48), scale=away)
    changed = x.clone()
    changed[8:] += 100 * torch.randn(8, 3, 2)
    assert torch.equal(norm(changed, 8)[:8], y[:8])
    assert torch.equal(norm.eval()(x, 8), y)


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1]), (7, [7]), (9, [8, 1]), (16, [8, 8]), (17, [8, 8, 1])])
def test_groups_of_a_batch_that_is_not_a_multiple(batch, sizes):
    """The last one is smaller; the others do not depend on how many follow."""
    x = torch.randn(batch, 4, 3, dtype=torch.float64)
    y = BatchNormLocal(3).double()(x, 8)
    for group in y.split(sizes):
        assert group.mean((0, 1)).abs().max() < rounding(torch.float64, terms=32) * group.abs().max()
        # not rounding: ε = 1e-5 beside the variance
        assert group.var((0, 1), unbiased=False).allclose(torch.ones(3, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_local_batch_norm_of_half_precision_computes_in_float32(dtype):
    """Where mean ≫ deviation a bf16 mean is off by a deviation; the result may differ by its own rounding only."""
    torch.manual_seed(0)
    x = (torch.randn(8, 64, 4) + 20).to(dtype)
    norm = BatchNormLocal(4)
    y, exact = norm(x, 8), norm(x.double(), 8)
    assert y.dtype == dtype and exact.dtype == torch.float64
    assert (y - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("kinds", [2, 3])
def test_every_virtual_group_of_an_interleaved_batch_has_all_kinds(kinds):
    for batch in range(1, 41):
        labels = interleave(*[torch.full((batch,), kind) for kind in range(kinds)])
        for group in labels.split(kinds * NEIGHBOURS):
            counts = group.bincount(minlength=kinds)
            assert (counts == counts[0]).all() and counts[0] > 0


def logits_in_parts(heads: DiscriminatorHeads, kinds: list[list[torch.Tensor]], size: int) -> torch.Tensor:
    """kinds: for each kind of sample one [B, N, C] per head.  -> [kinds · B, logits], from `size` samples a time"""
    logits = []
    for part in parts(len(kinds[0][0]), size):
        mixed = [interleave(*(batch[part] for batch in batches)) for batches in zip(*kinds, strict=True)]
        logits.append(heads(mixed, len(kinds) * NEIGHBOURS))
    return torch.cat(logits)


@pytest.mark.parametrize("batch", [8, 10, 16])
@pytest.mark.parametrize("kinds", [1, 2, 3])
@torch.no_grad()
def test_a_batch_cut_between_groups_gives_the_logits_of_the_whole(kinds, batch):
    """And one cut within a group does not."""
    heads = DiscriminatorHeads(8, count=2).double().eval()
    for head in heads.heads:
        head.load_state_dict(random_head(8).state_dict())
    features = [[torch.randn(batch, 5, 8).double() + kind for _ in range(2)] for kind in range(kinds)]
    whole = logits_in_parts(heads, features, 0)
    for size in (NEIGHBOURS, 2 * NEIGHBOURS):
        assert_close(logits_in_parts(heads, features, size), whole, of_network(heads))
    assert (logits_in_parts(heads, features, 2) - whole).abs().max() > 1e-2


def test_neighbours_swap_within_their_group_whatever_else_is_in_the_batch():
    x = torch.arange(10)
    assert swapped(x, 4).tolist() == [3, 0, 1, 2, 7, 4, 5, 6, 9, 8]
    for size in (4, 8):
        assert torch.equal(torch.cat([swapped(x[part], 4) for part in parts(10, size)]), swapped(x, 4))
    rows = torch.randn(6, 2, 3)
    assert torch.equal(swapped(rows, 3), rows[[2, 0, 1, 5, 3, 4]])


@pytest.mark.parametrize("groups", NormGroups)
def test_local_batch_norm_of_two_kinds(groups):
    """Kinds that are constant, 1 and −1: in mixed groups they stay apart, in their own they vanish."""
    arranged, norm = ARRANGEMENTS[groups], BatchNormLocal(1)
    real, fake = torch.ones(8, 3, 1), -torch.ones(8, 3, 1)
    on_real, on_fake = arranged.part(norm(arranged.join(real, fake), arranged.group(4, 2)), 2)
    expected = 1 / math.sqrt(1 + norm.eps) if groups is NormGroups.mixed else 0.0
    assert_close(on_real, expected * real, rounding(torch.float32, terms=24))
    assert_close(on_fake, expected * fake, rounding(torch.float32, terms=24))


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
            on_real, on_fake = deinterleave(heads([interleave(real, fake)], 8), 2)
        else:
            on_real, on_fake = heads([torch.cat([real, fake])], 8).chunk(2)
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
        logits = frozen([features], 8)
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
    heads(features, 8)
    assert not torch.equal(before, heads.state_dict()[key])

    other = DiscriminatorHeads(width=16, count=1)
    other.load_state_dict(heads.state_dict())
    assert torch.equal(other(features, 8), heads(features, 8))


def test_bf16_autocast_is_close_to_float32():
    torch.manual_seed(0)
    heads = DiscriminatorHeads(width=64, count=1).eval()
    features = [torch.randn(8, 16, 64)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = heads(features, 8).float()
    full = heads(features, 8)
    assert (half - full).norm() < of_autocast(heads) * full.norm()
