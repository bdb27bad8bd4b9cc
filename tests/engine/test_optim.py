import math

import numpy as np
import pytest
import torch
from torch import nn

from sprint.base.errors import SprintError
from sprint.engine.optim import (
    CAME,
    build_optimizer,
    clip_gradients,
    learning_rate_schedule,
    placement,
    start_state,
)
from sprint.recipe.schema import Optimizer, OptimizerKind
from tests.engine.optim_processes import (
    DTYPES,
    SETTINGS,
    SHAPES,
    STEPS,
    Run,
)
from tests.launch import forked
from tests.tolerance import assert_close, near, rounding

BETA1, BETA2, BETA3 = BETAS = (0.9, 0.999, 0.9999)
EPS1, EPS2 = 1e-30, 1e-16


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def came_by_hand(theta: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float) -> np.ndarray:
    """Algorithm 2 of arXiv 2307.02047, line by line, with the sums 1ᵀ and 1 of the paper."""
    rows, columns = theta.shape
    one_rows, one_columns = np.ones((rows, 1)), np.ones((columns, 1))
    m = np.zeros_like(theta)
    r, R = np.zeros((rows, 1)), np.zeros((rows, 1))
    c, C = np.zeros((1, columns)), np.zeros((1, columns))
    for g in gradients:
        r = BETA2 * r + (1 - BETA2) * (g**2 + EPS1) @ one_columns
        c = BETA2 * c + (1 - BETA2) * one_rows.T @ (g**2 + EPS1)
        v = r @ c / (one_rows.T @ r)
        u = g / np.sqrt(v)
        u_hat = u / max(1.0, rms(u) / 1.0)
        m = BETA1 * m + (1 - BETA1) * u_hat
        U = (u_hat - m) ** 2
        R = BETA3 * R + (1 - BETA3) * (U + EPS2) @ one_columns
        C = BETA3 * C + (1 - BETA3) * one_rows.T @ (U + EPS2)
        S = R @ C / (one_rows.T @ R)
        theta = theta - lr * decay * theta - lr / np.sqrt(S) * m
    return theta


def run_came(theta: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float = 0.0) -> np.ndarray:
    parameter = nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = CAME([parameter], lr=lr, betas=BETAS, eps=(EPS1, EPS2), weight_decay=decay)
    for g in gradients:
        parameter.grad = torch.from_numpy(g.copy())
        optimizer.step()
    return parameter.detach().numpy()


THETA = np.array([[0.5, -1.0, 2.0], [0.1, 0.0, -0.3]])
GRADIENTS = [
    np.array([[1.0, -2.0, 0.5], [3.0, 0.1, -0.2]]),
    np.array([[-0.4, 1.5, 0.5], [2.0, -0.3, 0.7]]),
    np.array([[0.2, 0.2, -4.0], [1.0, 0.9, 0.0]]),
]


def assert_near(moved: np.ndarray, expected: np.ndarray) -> None:
    """As far as rounding of weights as large as THETA's goes, in three updates of some ten operations."""
    by_update = rounding(torch.float64, terms=6, steps=10)
    assert_close(
        torch.from_numpy(moved),
        torch.from_numpy(expected),
        len(GRADIENTS) * by_update,
        scale=abs(THETA).max(),
    )


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_came_on_a_matrix_is_algorithm_2(decay):
    expected = came_by_hand(THETA, GRADIENTS, lr=0.01, decay=decay)
    assert_near(run_came(THETA, GRADIENTS, 0.01, decay), expected)
    assert np.abs(expected - THETA).min() > 1e-3


def test_first_came_step_in_numbers():
    """Equal gradients: û = 1, m = 0.1, U = 0.81, S = 8.1e-5, step = lr · 0.1/√8.1e-5 = 11.11 lr."""
    moved = THETA - run_came(THETA, [np.full((2, 3), 7.0)], lr=0.01)
    assert_near(moved, np.full((2, 3), 0.01 * 0.1 / np.sqrt(8.1e-5)))


def test_came_on_a_vector_keeps_the_whole_second_moment_and_no_instability():
    theta, gradients = THETA[0], [g[0] for g in GRADIENTS]
    expected, square, m = theta.copy(), np.zeros(3), np.zeros(3)
    for g in gradients:
        square = BETA2 * square + (1 - BETA2) * (g**2 + EPS1)
        u = g / np.sqrt(square)
        m = BETA1 * m + (1 - BETA1) * u / max(1.0, rms(u))
        expected = expected - 0.01 * m
    assert_near(run_came(theta, gradients, 0.01), expected)


def test_came_treats_a_convolution_as_its_matrix():
    shaped = run_came(THETA.reshape(2, 3, 1, 1), [g.reshape(2, 3, 1, 1) for g in GRADIENTS], 0.01)
    assert_near(shaped.reshape(2, 3), run_came(THETA, GRADIENTS, 0.01))


def test_came_state_of_a_pointwise_convolution_is_one_moment_and_two_edges():
    conv = nn.Conv2d(32, 48, 1, bias=False)
    optimizer = CAME(conv.parameters(), lr=1e-3)
    conv(torch.randn(1, 32, 2, 2)).sum().backward()
    optimizer.step()
    assert sum(s.numel() for s in optimizer.state[conv.weight].values()) == 32 * 48 + 2 * (32 + 48)


def test_came_survives_zero_gradients_in_float32():
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = CAME([parameter], lr=0.1)
    parameter.grad = torch.zeros(4, 4)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(4, 4))
    parameter.grad[0] = 1e-6
    optimizer.step()
    assert torch.isfinite(parameter).all()
    assert torch.equal(parameter[1:].detach(), torch.ones(3, 4))


def test_came_learns_a_linear_map():
    torch.manual_seed(0)
    target, x = torch.randn(8, 8), torch.randn(256, 8)
    layer = nn.Linear(8, 8)
    optimizer = CAME(layer.parameters(), lr=2e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (layer(x) - x @ target.T).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize(
    "settings",
    [
        Optimizer(kind=OptimizerKind.came, lr=1e-3, warmup_steps=4),
        Optimizer(kind=OptimizerKind.adamw, lr=1e-3, betas=(0.9, 0.99), warmup_steps=4),
    ],
)
def test_resume_continues_bit_for_bit(settings, tmp_path):
    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(3, 5, 3), nn.Flatten(), nn.Linear(10, 2))
        optimizer = build_optimizer(model.parameters(), settings)
        return model, optimizer, learning_rate_schedule(optimizer, settings, 6)

    def train(model, optimizer, schedule, first, last):
        for step in range(first, last):
            x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            schedule.step()

    whole = start()
    train(*whole, 0, 6)
    half = start()
    train(*half, 0, 3)
    torch.save([part.state_dict() for part in half], tmp_path / "half.pt")
    resumed = start()
    states = torch.load(tmp_path / "half.pt", weights_only=True)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    train(*resumed, 3, 6)
    for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed[1].param_groups[0]["lr"] == 1e-3


KINDS = pytest.mark.parametrize(
    "settings",
    [
        Optimizer(kind=OptimizerKind.came, lr=1e-2, weight_decay=0.1),
        Optimizer(kind=OptimizerKind.adamw, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1),
    ],
    ids=["came", "adamw"],
)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(), nn.Linear(20, 2))


def set_gradients(model: nn.Module, seed: int, spoilt: float | None = None) -> None:
    """Random ones; `spoilt` becomes one number of each."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if spoilt is not None:
            p.grad.view(-1)[0] = spoilt


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Copies of the weights and of their state; state is zero before it is there."""
    states = [optimizer.state[p] for p in model.parameters()]
    kept = [state[name] for state in states for name in sorted(state)]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *kept)]


@KINDS
@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
def test_found_inf_leaves_weights_and_state_to_the_bit(settings, spoilt):
    """Also on the first update, whose state is all zeros; what comes after is as if it had never been."""
    model, plain = small_model(), small_model()
    optimizer = build_optimizer(model.parameters(), settings)
    undisturbed = build_optimizer(plain.parameters(), settings)
    for step in range(5):
        bad = step in (0, 3)
        before = everything(model, optimizer)
        set_gradients(model, step, spoilt if bad else None)
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        after = everything(model, optimizer)
        if bad and step:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        if not bad:
            set_gradients(plain, step)
            undisturbed.step()
            assert all(torch.equal(a, b) for a, b in zip(after, everything(plain, undisturbed), strict=True))
            assert not torch.equal(before[0], after[0])
        elif not step:
            assert not any(state.any() for state in after[len(before) :])
            assert all(torch.equal(a, b) for a, b in zip(before, after[: len(before)], strict=True))


@KINDS
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_started_state_is_what_the_first_update_makes(settings, dtype):
    started, lazy = small_model().to(dtype), small_model().to(dtype)
    optimizers = [build_optimizer(model.parameters(), settings) for model in (started, lazy)]
    start_state(optimizers[0])
    kept = [state for p in started.parameters() for state in optimizers[0].state[p].values()]
    assert kept and not any(state.any() for state in kept)
    for step in range(3):
        for model, optimizer in zip((started, lazy), optimizers, strict=True):
            set_gradients(model, step)
            optimizer.found_inf = torch.tensor(float(step == 0))  # the first leaves it as it was made
            optimizer.step()
        for a, b in zip(started.parameters(), lazy.parameters(), strict=True):
            ours, theirs = (o.state[p] for o, p in zip(optimizers, (a, b), strict=True))
            assert ours.keys() == theirs.keys() and torch.equal(a, b)
            for name in ours:
                assert torch.equal(ours[name], theirs[name])
                assert (ours[name].dtype, ours[name].stride()) == (theirs[name].dtype, theirs[name].stride())
    in_place = [state for p in started.parameters() for state in optimizers[0].state[p].values()]
    assert all(a is b for a, b in zip(kept, in_place, strict=True))


@pytest.mark.parametrize("kind", SETTINGS)
def test_placement_knows_every_entry_of_a_state(kind):
    """Of weights with three axes, one, and none; the shapes of the first say whether it is right."""
    rows, columns = 4, 6
    shapes = {
        "came": {"like the weight": (rows, columns), "by row": (rows,), "whole": (columns,)},
        "adamw": {"like the weight": (rows, 2, 3), "whole": ()},
    }[kind]
    weights = [nn.Parameter(torch.ones(shape)) for shape in ((rows, 2, 3), (rows,), ())]
    optimizer = build_optimizer(weights, SETTINGS[kind])
    start_state(optimizer)
    matrix, vector, scalar = (optimizer.state[w] for w in weights)
    assert all(shapes[placement(3, name)] == state.shape for name, state in matrix.items())
    assert all(
        placement(1, name) == ("like the weight" if state.ndim else "whole") for name, state in vector.items()
    )
    assert {placement(0, name) for name in scalar} == {"whole"}


def test_placement_refuses_a_name_that_no_state_has():
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        placement(2, "max_exp_avg_sq")


def test_came_moves_a_channels_last_convolution_as_any_other():
    convolutions = [nn.Conv2d(4, 6, 3) for _ in range(2)]
    convolutions[1].load_state_dict(convolutions[0].state_dict())
    convolutions[1].to(memory_format=torch.channels_last)
    gradient = torch.randn(6, 4, 3, 3)
    for conv in convolutions:
        optimizer = CAME([conv.weight], lr=0.1)
        conv.weight.grad = torch.empty_like(conv.weight).copy_(gradient)
        optimizer.step()
    assert_close(*(conv.weight for conv in convolutions), rounding(torch.float32, terms=4 * 9, steps=4))


def test_build_optimizer_uses_the_settings():
    parameters = [nn.Parameter(torch.ones(2, 2))]
    came = build_optimizer(iter(parameters), Optimizer(lr=3e-4, betas=(0.8, 0.9, 0.95), weight_decay=0.1))
    assert isinstance(came, CAME)
    group = came.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.8, 0.9, 0.95), 0.1)
    assert (group["eps"], group["clip_threshold"]) == ((1e-30, 1e-16), 1.0)
    adamw = build_optimizer(parameters, Optimizer(OptimizerKind.adamw, 4e-4, (0.9, 0.99), 0.01))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.9, 0.99)
    assert adamw.param_groups[0]["fused"]  # the others know no found_inf


def test_build_optimizer_refuses_wrong_betas_and_half_precision():
    parameters = [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(SprintError, match=r"betas = \[0.9, 0.999, 0.9999\], but adamw takes 2"):
        build_optimizer(parameters, Optimizer(kind=OptimizerKind.adamw))
    with pytest.raises(SprintError, match="came takes 3 numbers"):
        build_optimizer(parameters, Optimizer(betas=(0.9, 0.999)))
    with pytest.raises(TypeError, match="float32"):
        build_optimizer([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], Optimizer())


@pytest.mark.parametrize(
    ("steps", "decay_share", "factors"),
    [
        (4, 0.0, [0.25, 0.5, 0.75, 1, 1]),
        (0, 0.0, [1, 1]),
        (1, 0.0, [1, 1]),
        (2, 0.5, [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),  # of ten updates the last five fall
        (0, 1.0, [1, 0.75, 0.5, 0.25]),
    ],
)
def test_the_learning_rate_rises_and_falls_linearly(steps, decay_share, factors):
    settings = Optimizer(lr=2e-6, warmup_steps=steps, decay_share=decay_share)
    optimizer = build_optimizer([nn.Parameter(torch.ones(2, 2))], settings)
    schedule = learning_rate_schedule(optimizer, settings, len(factors))
    seen = []
    for _ in factors:
        seen.append(optimizer.param_groups[0]["lr"] / 2e-6)
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx(factors)


def test_clip_gradients_returns_the_norm_before():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients(iter([a, b]), 0.1).item() == pytest.approx(5.0)
    clipped = 1e-6 / 5 + rounding(torch.float32, terms=2, steps=4)  # torch divides by the norm + 1e-6
    assert (a.grad.item(), b.grad.item()) == near((0.06, 0.08), clipped)
    assert clip_gradients([a, b], 1.0).item() == near(0.1, clipped)
    assert a.grad.item() == near(0.06, clipped)
    a.grad = torch.tensor([float("inf")])
    assert not torch.isfinite(clip_gradients([a, b], 1.0))


# ---- several processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def theirs(request, tmp_path_factory):
    """What processes found that hold rows of each weight, some uneven, some none."""
    folder = tmp_path_factory.mktemp("optim")
    forked("tests.engine.optim_processes", request.param, str(folder))
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SETTINGS)
def test_row_shards_move_as_whole_weights(theirs, kind, dtype):
    """Weights, every entry of the state, and the norm before the clip. The script itself asserts that a NaN in
    one process's rows leaves weights and state of all to the bit."""
    shards, whole = theirs[f"{kind}, {dtype}"], Run(kind, dtype)
    tolerance = rounding(DTYPES[dtype], terms=math.prod(SHAPES[0]), steps=STEPS)
    for step in range(STEPS):
        whole.update(step)
    assert shards["empty"] > 0
    assert shards["norms"][:STEPS] == near(whole.norms, tolerance)
    assert math.isnan(shards["norms"][STEPS])
    expected = whole.tensors()
    assert shards["tensors"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(shards["tensors"][name], tensor, tolerance)


@pytest.mark.parametrize(("kind", "count"), [("came", 3), ("adamw", 0)])
def test_an_update_of_shards_is_three_all_reduces_and_the_clip_is_one(theirs, kind, count):
    assert theirs[f"{kind}, float32"]["all_reduces"] == STEPS * (count + 1)


def test_shards_that_wait_for_a_sum_keep_nothing_of_their_size(theirs):
    """In bytes. No process has fewer than 19 rows of the first weight; sums of its columns are 160 bytes."""
    _, columns = SHAPES[0]
    assert 0 < theirs["came, float32"]["largest"] < 4 * 19 * columns / 4


def test_clip_of_shards_does_not_overflow_where_the_norm_does_not(monkeypatch):
    """3e19 has no square in float32; the sum over two processes of equal shards, without processes."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, group: total.mul_(2))
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.tensor([3e19])
    norm = clip_gradients([p], 1.0, group=object())
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(3e19 * math.sqrt(2))
    assert p.grad.item() == pytest.approx(math.sqrt(0.5))
