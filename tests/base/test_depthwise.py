"""The depthwise operator against torch's convolution: value, gradients, tangent, and graphs that know its shape."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import conv2d

from sprint.base.depthwise import depthwise
from sprint.maths.dual import value_and_tangent
from tests.tolerance import assert_close, rounding

CHANNELS = 6


def parts(side: int = 3, bias: bool = True, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    return random(2, 5, 4, CHANNELS), random(CHANNELS, 1, side, side), random(CHANNELS) if bias else None


def oracle(x, weight, bias):
    picture = x.permute(0, 3, 1, 2)
    return conv2d(picture, weight, bias, padding=weight.shape[-1] // 2, groups=CHANNELS).permute(0, 2, 3, 1)


def gradients(function, x, weight, bias):
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    y = function(x, weight, bias)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    # a gradient that lies with its channels first, as a caller's may
    towards = towards.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    return [y, *torch.autograd.grad(y, leaves, towards)]


@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients(side, bias):
    given = parts(side, bias)
    terms = max(side**2, 2 * 5 * 4)  # of the value; of a weight's gradient: pictures times places
    for ours, theirs in zip(gradients(depthwise, *given), gradients(oracle, *given), strict=True):
        assert_close(ours, theirs, rounding(torch.float32, terms=terms))


def test_its_derivative_is_its_own_by_differences():
    x, weight, bias = parts(dtype=torch.float64)
    assert torch.autograd.gradcheck(depthwise, (x, weight, bias))


def test_what_nobody_asks_for_is_not_computed():
    x, weight, bias = parts()
    frozen = depthwise(x, weight.detach(), bias.detach())
    (of_x,) = torch.autograd.grad(frozen.sum(), x)
    (expected,) = torch.autograd.grad(oracle(x, weight, bias).sum(), x)
    assert_close(of_x, expected, rounding(torch.float32, terms=9))
    (of_weight,) = torch.autograd.grad(depthwise(x.detach(), weight, bias).sum(), weight)
    (expected,) = torch.autograd.grad(oracle(x, weight, bias).sum(), weight)
    assert_close(of_weight, expected, rounding(torch.float32, terms=40))


def test_the_tangent_of_a_dual():
    x, weight, bias = parts()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    t = torch.zeros(())
    value, tangent = value_and_tangent(lambda x, t: depthwise(x, weight, bias) + 0 * t, x, t, v, t)
    assert_close(value, oracle(x, weight, bias), rounding(torch.float32, terms=10))
    assert_close(tangent, oracle(v, weight, None), rounding(torch.float32, terms=9))


def test_a_graph_knows_shapes_and_that_nothing_changes_in_place():
    x, weight, bias = parts()
    torch.library.opcheck(torch.ops.sprint.depthwise.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.sprint.depthwise.default, (x, weight, None))


def test_the_result_lies_channels_last():
    x, weight, bias = parts()
    turned = x.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not turned.is_contiguous() and depthwise(turned, weight, bias).is_contiguous()
    assert_close(
        depthwise(turned, weight, bias), depthwise(x, weight, bias), rounding(torch.float32, terms=10)
    )


def test_under_autocast_it_is_a_convolution_of_that_dtype():
    given = parts()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gradients(depthwise, *given), gradients(oracle, *given)
    assert ours[0].dtype == theirs[0].dtype == torch.bfloat16
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == expected.dtype
        assert_close(mine, expected, rounding(torch.bfloat16, terms=40))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here: make triton-check")
def test_the_kernels_of_a_gpu_by_tritons_interpreter():
    command = [sys.executable, "tests/base/depthwise_processes.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": "."}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) == 3
    assert max(map(max, found)) < rounding(torch.float32, terms=192)  # places of the largest


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_as_on_a_cpu(dtype):
    given = parts(dtype=dtype)
    there = [leaf.detach().cuda().requires_grad_() for leaf in given]
    expected = gradients(depthwise, *given)
    y = depthwise(*there)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=dtype).cuda()
    found = [y, *torch.autograd.grad(y, there, towards)]
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours.cpu(), theirs, rounding(dtype, terms=2 * 5 * 4))
