"""Every rule of `sprint.maths.dual` against `torch.func.jvp`, and everything that must raise rather than guess."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import get_overridable_functions

from sprint.engine.recompute import recompute_in_backward
from sprint.maths.dual import RULES, Dual, value_and_tangent
from sprint.models.student import Student
from sprint.models.teacher import DENSE_TIME, SPARSE_TIME
from sprint.models.view import TrigFlowView
from tests.maths.dual_cases import (
    ANYWHERE,
    FIRST,
    NO_PAIR,
    REFUSED,
    X,
)
from tests.tiny import tiny_batch, tiny_network
from tests.tolerance import assert_close, central, near, of_autocast, of_network, rounding

TOLERANCE = {dtype: rounding(dtype, terms=16, steps=4) for dtype in (torch.float64, torch.float32)}
BY_HAND = rounding(torch.float64, steps=8)


def positive(shape, seed: int, dtype: torch.dtype, contiguous: bool) -> torch.Tensor:
    """In (0.5, 1.5); if not contiguous, with its axes reversed in memory and gaps between."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64).add(0.5).to(dtype)
    if contiguous or not shape:
        return x
    wide = torch.zeros(*shape[::-1], 2, dtype=dtype)[..., 0].permute(*reversed(range(len(shape))))
    return wide.copy_(x)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check(function, xs, vs, dual: tuple[bool, ...], dtype: torch.dtype) -> float:
    """`function` with some of its inputs Dual: its value and gradients bit by bit, its tangent by jvp."""
    graph = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in xs]
    plain = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in xs]
    out = function(*(Dual(x, v) if d else x for x, v, d in zip(graph, vs, dual, strict=True)))
    y = function(*plain)

    def of_duals(*some):
        given = iter(some)
        return function(*(next(given) if d else x for x, d in zip(xs, dual, strict=True)))

    with sdpa_kernel(SDPBackend.MATH):
        primals, tangents = ([z for z, d in zip(all, dual, strict=True) if d] for all in (xs, vs))
        _, expected = torch.func.jvp(of_duals, tuple(primals), tuple(tangents))
    assert isinstance(out, Dual) and torch.equal(out.value, y)
    assert not out.tangent.requires_grad and out.tangent.grad_fn is None
    gradients = (torch.autograd.grad(z.sum(), inputs) for z, inputs in ((out.value, graph), (y, plain)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert error(out.tangent, expected) < TOLERANCE[dtype]
    assert expected.norm() > 0


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", ANYWHERE)
def test_duals_anywhere(name, dtype, contiguous):
    function, *shapes = ANYWHERE[name]
    xs = [positive(shape, seed, dtype, contiguous) for seed, shape in enumerate(shapes)]
    vs = [positive(shape, 9 + seed, dtype, not contiguous) - 1.1 for seed, shape in enumerate(shapes)]
    for dual in product((True, False), repeat=len(shapes)):
        if any(dual):
            check(function, xs, vs, dual, dtype)


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", FIRST)
def test_dual_as_the_only_input(name, dtype, contiguous):
    function, shape = FIRST[name]
    x, v = positive(shape, 1, dtype, contiguous), positive(shape, 2, dtype, not contiguous) - 1.1
    check(function, [x], [v], (True,), dtype)


# ---- what must raise ----------------------------------------------------------------------------------------


def test_a_name_means_one_function():
    """Rules are found by name: only torch's own three places may know such a function."""
    for place, functions in get_overridable_functions().items():
        if getattr(place, "__name__", "") not in (
            "torch",
            "Tensor",
            "torch.functional",
            "torch.nn.functional",
        ):
            assert not {getattr(f, "__name__", "") for f in functions} & RULES.keys()


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_rule_raises_and_names_itself(message):
    with pytest.raises(NotImplementedError, match=message):
        REFUSED[message](Dual(X, torch.ones_like(X)))


@pytest.mark.parametrize("shape", [(2, 3), (1,)], ids=["matrix", "one number"])
@pytest.mark.parametrize("name", NO_PAIR)
def test_a_dual_is_never_taken_for_a_pair(name, shape):
    x = X[:, :3] if shape == (2, 3) else X[0, :1]
    with pytest.raises(
        (TypeError, AttributeError, NotImplementedError, RuntimeError, IndexError, ValueError)
    ):
        print(NO_PAIR[name](Dual(x.clone().requires_grad_(), torch.ones_like(x))))


def test_comparisons_are_of_the_value():
    x = Dual(X, torch.ones_like(X))
    assert torch.equal(x == 0.5, X == 0.5) and torch.equal(x != X, X != X) and torch.equal(x < X, X < X)
    assert torch.equal(x > 0, X > 0) and torch.equal(x <= 1.0, X <= 1.0)
    assert x is x and len({x, x}) == 1


@pytest.mark.parametrize("layout", ["value", "tangent"])
def test_the_tangent_may_lie_otherwise_in_memory(layout):
    x, v = torch.randn(4, 6), torch.randn(4, 6)
    strided = {"value": x, "tangent": v}[layout].t().contiguous().t()
    pair = Dual(strided if layout == "value" else x, strided if layout == "tangent" else v)
    out = pair.view(2, 2, 6)[1].contiguous()
    assert torch.equal(out.value, x.view(2, 2, 6)[1]) and torch.equal(out.tangent, v.view(2, 2, 6)[1])
    out = nnf.layer_norm(pair, (6,))
    expected = torch.func.jvp(lambda x: nnf.layer_norm(x, (6,)), (x,), (v,))[1]
    assert error(out.tangent, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_number_keeps_its_precision_in_half(dtype):
    """0.1 − x and 0.1 / x round once, as in the plain network, and not the number first."""
    x = torch.linspace(0.5, 2, 200).to(dtype)
    for function in (lambda x: 0.1 - x, lambda x: 0.1 / x, lambda x: x + 0.1, lambda x: x * 0.1):
        assert torch.equal(function(Dual(x, torch.ones_like(x))).value, function(x))


# ---- value_and_tangent --------------------------------------------------------------------------------------


def test_tangent_of_a_function_known_by_heart():
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(layer.weight, 3.0)
    x, t, v_x, v_t = (torch.tensor([number], dtype=torch.float64) for number in (2.0, 0.5, 0.7, -0.2))
    value, tangent = value_and_tangent(lambda x, t: layer(x) * torch.sin(t), x, t, v_x, v_t)
    assert value.item() == near(6 * math.sin(0.5), BY_HAND)
    assert tangent.item() == near(3 * 0.7 * math.sin(0.5) - 6 * 0.2 * math.cos(0.5), BY_HAND, scale=1)
    value.backward()
    assert layer.weight.grad.item() == near(2 * math.sin(0.5), BY_HAND)


def test_wrong_directions_and_outputs_are_errors():
    x, t = torch.ones(2, 3), torch.ones(2)
    for v_x, v_t in ((torch.ones(3, 2), t), (x.double(), t), (x, torch.ones(()))):
        with pytest.raises(ValueError, match="direction"):
            value_and_tangent(lambda x, t: x, x, t, v_x, v_t)
    with pytest.raises(ValueError, match="int64"):
        value_and_tangent(lambda x, t: x, x, t.long(), x, t.long())
    for out, kind in ((torch.ones(1), "Tensor"), (None, "NoneType")):
        with pytest.raises(TypeError, match=kind):
            value_and_tangent(lambda x, t, out=out: out, x, t, x, t)
    with pytest.raises(TypeError, match="tuple"):
        value_and_tangent(lambda x, t: (x,), x, t, x, t)


def test_the_tangent_never_takes_a_gradient():
    weight = torch.ones(3, requires_grad=True)
    v = torch.ones(2, 3, requires_grad=True)
    value, tangent = value_and_tangent(lambda x, t: x + t[:, None] * weight, v, v[:, 0], v, v[:, 0])
    assert value.requires_grad and not tangent.requires_grad


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # which is the point
def test_a_reentrant_checkpoint_would_cut_the_graph_and_raises():
    layer = nn.Linear(3, 3)
    x, t = torch.ones(2, 3), torch.ones(2)

    def F(x, t):
        return torch.utils.checkpoint.checkpoint(layer, layer(x), use_reentrant=True)

    with pytest.raises(RuntimeError, match="under no_grad"):
        value_and_tangent(F, x, t, x, t)


# ---- the student --------------------------------------------------------------------------------------------


def directions(x_hat: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(z.shape, generator=generator, dtype=z.dtype) for z in (x_hat, t))


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("time_scale", [DENSE_TIME, SPARSE_TIME])
def test_tangent_is_the_central_difference(true_float64, qk_norm, time_scale):
    view = TrigFlowView(tiny_network(qk_norm=qk_norm).double(), time_scale)
    x_hat, text, mask = tiny_batch(3, dtype=torch.float64)
    t = torch.tensor([0.1, 0.7, math.pi / 2 - 0.01], dtype=torch.float64)
    v_x, v_t = directions(x_hat, t)

    def F(x_hat, t):
        return view(x_hat, t, text, mask)

    _, tangent = value_and_tangent(F, x_hat, t, v_x, v_t)
    h = 1e-4 / time_scale if time_scale == SPARSE_TIME else 1e-5
    with torch.no_grad():
        difference = (F(x_hat + h * v_x, t + h * v_t) - F(x_hat - h * v_x, t - h * v_t)) / (2 * h)
    assert difference.norm() > 0.1
    assert error(tangent, difference) < central(h * time_scale, of_network(view, passes=2))


def test_tangent_sees_position_and_time_apart(true_float64):
    """Linear in (v_x, v_t), and neither part is zero."""
    view = TrigFlowView(tiny_network().double(), DENSE_TIME)
    x_hat, text, mask = tiny_batch(2, dtype=torch.float64)
    t = torch.tensor([0.4, 1.2], dtype=torch.float64)
    v_x, v_t = directions(x_hat, t)

    def tangent(v_x, v_t):
        return value_and_tangent(lambda x, t: view(x, t, text, mask), x_hat, t, v_x, v_t)[1]

    by_x, by_t = tangent(v_x, 0 * v_t), tangent(0 * v_x, v_t)
    assert by_x.norm() > 0.1 and by_t.norm() > 0.1
    assert_close(2 * by_x - 3 * by_t, tangent(2 * v_x, -3 * v_t), of_network(view, passes=2))


@torch.no_grad()
def test_self_attention_stays_linear_under_the_mathematical_kernel():
    """What torch.func.jvp needs for comparison changes softmax attention's kernel, and nothing else."""
    network = tiny_network()
    view = TrigFlowView(network, DENSE_TIME)
    x_hat, text, mask = tiny_batch(2)
    t = torch.tensor([0.4, 1.2])
    plain = view(x_hat, t, text, mask)
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(view(x_hat, t, text, mask), plain, of_network(view))

    for block in network.transformer_blocks:  # the trap: softmax in place of linear attention
        block.attn1.processor = block.attn2.processor
    assert (view(x_hat, t, text, mask) - plain).norm() > 1e-3 * plain.norm()


@torch.no_grad()
def test_linear_attention_by_hand():
    """out = Σ_j (relu q · relu k_j) v_j / Σ_j (relu q · relu k_j), head by head."""
    network = tiny_network(qk_norm=False)
    attention = network.transformer_blocks[0].attn1
    x_BND = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    q, k, v = (
        layer(x_BND).unflatten(2, (2, 16)).transpose(1, 2)
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    weights = torch.relu(q) @ torch.relu(k).transpose(2, 3)
    out = (weights / weights.sum(-1, keepdim=True)) @ v
    expected = attention.to_out[0](out.transpose(1, 2).flatten(2))
    assert_close(attention(x_BND), expected, of_network(attention))


def student_case(dtype=torch.float32):
    student = Student(tiny_network(guidance_embeds=True).to(dtype))
    x_hat, text, mask = tiny_batch(3, dtype=dtype)
    t, guidance = torch.tensor([0.1, 0.7, 1.5], dtype=dtype), torch.tensor([4.0, 4.5, 5.0], dtype=dtype)
    return student, lambda x, t: student(x, t, text, mask, guidance), x_hat, t


def gradients(student: Student, value: torch.Tensor) -> dict[str, torch.Tensor]:
    student.zero_grad()
    value.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in student.network.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_value_and_its_gradient_are_those_of_a_plain_forward(autocast):
    """Bit by bit, and every parameter has one, under autocast too, where a weight's cast is shared with the tangent."""
    student, F, x_hat, t = student_case()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, tangent = value_and_tangent(F, x_hat, t, *directions(x_hat, t))
    ours = gradients(student, value)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = F(x_hat, t)
    theirs = gradients(student, plain)
    assert torch.equal(value, plain)
    assert not tangent.requires_grad and tangent.norm() > 0
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(g.norm() > 0 for g in theirs.values())


def test_bf16_tangent_is_near_the_exact_one():
    student, F, x_hat, t = student_case()
    v = directions(x_hat, t)
    exact = value_and_tangent(F, x_hat, t, *v)[1]
    with torch.autocast("cpu", torch.bfloat16):
        tangent = value_and_tangent(F, x_hat, t, *v)[1]
    assert tangent.dtype == torch.float32 and 1e-4 < error(tangent, exact) < of_autocast(student)


def test_nothing_of_the_tangent_outlives_the_pass():
    """The graph keeps the value's tensors alone: none more than a plain forward keeps."""

    def saved(run) -> list:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            out = run()
        return sorted(kept), out

    _, F, x_hat, t = student_case()
    ours, _ = saved(lambda: value_and_tangent(F, x_hat, t, *directions(x_hat, t)))
    plain, _ = saved(lambda: F(x_hat, t))
    assert ours == plain


# ---- activation checkpointing -------------------------------------------------------------------------------


def checkpointed(options: dict | None = None):
    """Value, tangent, gradients, and how often silu's rule ran in the forward and in the backward."""
    CALLS.clear()
    student, F, x_hat, t = student_case()
    student.train()
    if options is not None:
        student.network.enable_gradient_checkpointing(**options)
    value, tangent = value_and_tangent(F, x_hat, t, *directions(x_hat, t))
    calls = len(CALLS)
    return value, tangent, gradients(student, value), calls, len(CALLS) - calls


CALLS: list[None] = []


@pytest.fixture
def counted(monkeypatch):
    rule = RULES["silu"]
    monkeypatch.setitem(RULES, "silu", lambda *args: CALLS.append(None) or rule(*args))


@pytest.mark.parametrize("ours", [True, False], ids=["recompute_in_backward", "diffusers' own"])
def test_activation_checkpointing_gives_the_same(counted, ours):
    """With ours, the backward recomputes no tangent."""
    value, tangent, gradients, forward, backward = checkpointed()
    assert forward > 0 and backward == 0
    options = {"gradient_checkpointing_func": recompute_in_backward} if ours else {}
    same_value, same_tangent, same_gradients, same_forward, again = checkpointed(options)
    assert torch.equal(value, same_value) and torch.equal(tangent, same_tangent)
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)
    assert same_forward == forward
    assert (again == 0) == ours
