"""Faster products on a CPU: the same numbers, gradients, tangents and copies as torch's own."""

import copy

import pytest
import torch
from torch import nn

from sprint.base import products
from sprint.maths.dual import value_and_tangent
from tests.tolerance import assert_close, rounding

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN"
)


@pytest.fixture
def everywhere(monkeypatch):
    """As on a processor where oneDNN is faster."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


PRODUCT = rounding(torch.float32, terms=40)  # of 24 or 40 numbers


def pair(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    theirs = nn.Linear(24, 40, bias=bias)
    return theirs, products.use_products(copy.deepcopy(theirs))


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (24,), (2, 1, 3, 24)])
def test_value_and_gradients(everywhere, shape, bias):
    theirs, ours = pair(bias)
    results = []
    for layer in (theirs, ours):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 2 * PRODUCT)  # there and back
    assert "OnednnLinear" not in repr(results[0][0].grad_fn) and "onednn" in repr(results[1][0].grad_fn)


@needs_onednn
def test_inputs_that_lie_otherwise_in_memory(everywhere):
    theirs, ours = pair()
    x = torch.randn(24, 6, 3).permute(2, 1, 0)
    assert_close(theirs(x), ours(x), PRODUCT)


@needs_onednn
def test_no_gradient_is_computed_that_nobody_asked_for(everywhere):
    _, ours = pair()
    ours.requires_grad_(False)
    x = torch.randn(3, 24, requires_grad=True)
    ours(x).sum().backward()
    assert_close(x.grad, ours.weight.sum(0).expand(3, -1), PRODUCT)
    assert ours.weight.grad is None and ours.bias.grad is None


@needs_onednn
def test_duals_and_function_transforms_see_the_right_derivative(everywhere):
    """torch.func.jvp of an operation without forward mode is silently zero: there, torch's own takes over."""
    _, ours = pair()
    x, v = torch.randn(2, 3, 24)
    expected = v @ ours.weight.T
    _, functional = torch.func.jvp(ours, (x,), (v,))
    _, dual = value_and_tangent(lambda x, t: ours(x) + 0 * t, x, torch.zeros(()), v, torch.zeros(()))
    with torch.autograd.forward_ad.dual_level():
        y = ours(torch.autograd.forward_ad.make_dual(x, v))
        forward_mode = torch.autograd.forward_ad.unpack_dual(y).tangent
    for tangent in (functional, dual, forward_mode):
        assert_close(tangent, expected, PRODUCT)


@needs_onednn
def test_other_dtypes_and_autocast_are_torchs_own(everywhere):
    theirs, ours = pair()
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(theirs(x), ours(x)) and ours(x).dtype == torch.bfloat16
    assert torch.equal(theirs.double()(x.double()), ours.double()(x.double()))


@needs_onednn
def test_a_copy_has_weights_of_its_own_and_names_stay(everywhere):
    theirs, ours = pair()
    other = copy.deepcopy(ours)
    nn.init.zeros_(ours.weight)
    x = torch.randn(3, 24)
    assert_close(other(x), theirs(x), PRODUCT)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_where_it_is_not_faster_nothing_changes(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    _, ours = pair()
    assert "forward" not in vars(ours)


@needs_onednn
def test_a_frozen_layer_keeps_no_input_for_the_backward_pass(everywhere):
    _, ours = pair()
    kept = []
    x = torch.randn(3, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        ours.requires_grad_(False)(x)
        frozen, kept[:] = list(kept), []
        ours.requires_grad_(True)(x.detach())
    assert frozen == [(40, 24)] and kept == [(3, 24)]
