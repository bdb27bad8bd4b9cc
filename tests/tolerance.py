"""How far apart two computations of one number may lie: by dtype, length of the sum and steps, never by machine.

Kernels of other processors, other batch splits and other thread counts add the same terms in another order.
What that may change is derived here and nowhere else. Three kinds of tolerance are not rounding and say so:
`sampling` (a mean of n random draws), `central` (a difference quotient) and storage in few bits, which is
`rounding` of the stored dtype.

Sources: N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 2002, chapters 3 and 4 (worst
case, norms); N. Higham and T. Mary, A new approach to probabilistic rounding error analysis, 2019, theorem 2.4.
"""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

LIKELY = 4  # λ: √n·λ·u holds with a probability of at least 1 − 2 exp(−λ²/2), whatever the errors' spread
ERRORS = 5  # standard errors of a mean: one in two million
WITH_SUMS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def rounding(dtype: torch.dtype, *, terms: int = 1, steps: int = 1) -> float:
    """Relative distance of two computations of a sum of `terms`, `steps` such sums one upon the other.

    One operation errs by u = eps / 2 of its result. Over n terms that makes at most n·u of Σ|x| (3.1, 4.2),
    and λ·√n·u where the errors are independent, a random walk; the smaller of the two bounds holds. Both
    computations err, so eps stands for u. Steps add up in the worst case, since each starts from what the one
    before got wrong. Relative to the largest element of the result: where terms cancel, an element by itself
    has no relative accuracy.
    """
    return torch.finfo(dtype).eps * min(terms, LIKELY * math.sqrt(terms)) * steps


def of_network(*modules: nn.Module, passes: int = 1, terms: int = 1) -> float:
    """`rounding` through networks: one walk along the sums of all layers, over their inputs or `terms` if longer.

    Layers err independently and hand on what came before about as large as it was, so that their errors add
    as those of one long sum do. A backward pass is two more passes (towards inputs and towards weights), a
    tangent one. As if no two layers stood side by side, which pays for products without weights, as in attention.
    """
    weights = [m.weight for module in modules for m in module.modules() if isinstance(m, WITH_SUMS)]
    walk = sum(max(terms, weight.numel() // len(weight)) for weight in weights)
    return rounding(weights[0].dtype, terms=passes * walk)


def of_autocast(network: nn.Module) -> float:
    """Relative error of a network's output where every layer rounds its inputs to bfloat16: a walk of so many steps."""
    layers = sum(isinstance(module, WITH_SUMS) for module in network.modules())
    return rounding(torch.bfloat16, terms=layers)


def sampling(std: float, n: int) -> float:
    """Distance of a mean of `n` independent draws from its expectation: so many standard errors."""
    return ERRORS * std / math.sqrt(n)


def central(h: float, tolerance: float) -> float:
    """Error of a central difference with step `h`: h² of truncation, and the rounding of what is subtracted over h.

    For functions whose third derivative and value are about as large as their slope.
    """
    return h**2 + tolerance / h


def near(expected, tolerance: float, scale: float | None = None):
    """`pytest.approx` of a number or a list within `tolerance` of the largest expected, or of `scale`."""
    if scale is None:
        scale = torch.as_tensor(expected, dtype=torch.float64).abs().max().item()
    return pytest.approx(expected, rel=0, abs=tolerance * scale)


def readings(expected: Mapping[str, float], tolerance: float) -> dict:
    """What an update tells, by name: each near by its own size, or by 1 where terms of that size may cancel."""
    return {name: near(value, tolerance, max(1.0, abs(value))) for name, value in expected.items()}


def growing(expected: Sequence[float], tolerance: float, done: int = 0) -> list:
    """Losses of one update after the other, `done` before the first: each adds what its own passes err."""
    scale = max(1.0, *map(abs, expected))
    return [near(loss, tolerance * (done + k + 1), scale) for k, loss in enumerate(expected)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, scale: float | None = None) -> None:
    """Equal within `tolerance` of the largest element expected, or of `scale`; shape and dtype too."""
    if scale is None:
        scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def assert_all_close(actual: Mapping, expected: Mapping, tolerance: float) -> None:
    """Tensors by name within `tolerance` of the largest of all: some gradients are nothing but rounding."""
    assert actual.keys() == expected.keys()
    scale = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name],
            tensor,
            rtol=0,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_moved_alike(actual: Mapping, expected: Mapping, way: float, tolerance: float) -> None:
    """Weights after updates whose gradients agree to `tolerance`, each weight at most `way` from where it was.

    An optimizer that normalises, as Adam does, moves a weight whose gradient is nothing but rounding as far as
    any, and either way: no weight is nearer than 2 · way for certain. But gradients below √tolerance of the
    largest are about that share of all, and the others agree to √tolerance: so the mean is 2 · √tolerance · way.
    """
    assert actual.keys() == expected.keys()
    gaps = torch.cat([(actual[name] - tensor).abs().flatten() for name, tensor in expected.items()])
    assert gaps.max() <= 2 * way and gaps.mean() <= 2 * math.sqrt(tolerance) * way
