"""A value and its tangent in one forward pass of an unmodified PyTorch network.

    value, tangent = value_and_tangent(F, x_hat, t, v_x, v_t)

A `Dual` stands in for a tensor. Every operation on it computes the value exactly as the plain network would,
with its autograd graph, and the tangent by a rule, without one. So `value.backward()` is the plain backward,
and the tangent costs one more forward and no memory that outlives its layer.

The rules rest on two facts. What is linear in its input (reshapes, sums, projections) acts on the tangent as
it acts on the value. Where the Jacobian J is symmetric (elementwise functions, softmax, normalisation),
J·dx = Jᵀ·dx, so PyTorch's own fused backward kernel is the forward derivative.

An operation without a rule raises `NotImplementedError` and names itself; so does everything in place; an option
that a rule does not know is a TypeError. Each rule computes the value first, since autocast keeps a weight's cast,
and one made under no_grad would have no gradient.
Symbols: x, y the values before and after; dx, dy their tangents.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _operator(function: Callable) -> Callable:
    return lambda self, *other: _apply(function, self, *other)


def _refused(self, *other):
    raise TypeError(
        "sprint.maths.dual: no len, truth or contents of a Dual, and no change in place; see its .value"
    )


class Dual(tuple):
    """A tensor and its directional derivative, of one shape and dtype. The tangent never takes a gradient.

    To the hooks of DDP, FSDP2 and ZeRO it is a named tuple of two tensors, since that is what they look into
    when modules are called with it; to all other code it is one tensor, and no sequence.
    """

    value: Tensor
    tangent: Tensor
    _fields, _make, _asdict = ("value", "tangent"), _refused, _refused  # what tells engines a named tuple

    def __new__(cls, value: Tensor, tangent: Tensor):
        dual = super().__new__(cls, ("a Dual is no pair",))  # as C code, torch.cat(dual) say, would see it
        dual.value = value
        dual.tangent = tangent.detach() if tangent.requires_grad else tangent
        return dual

    def __iter__(self) -> Iterator[Tensor]:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] not in ("torch", "accelerate", "deepspeed"):
            raise TypeError(
                "sprint.maths.dual: engines only may iterate over a Dual; elsewhere use .unbind()"
            )
        return iter((self.value, self.tangent))

    @classmethod
    def __torch_function__(cls, function: Callable, types, args=(), kwargs=None):
        return _apply(function, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        """Metadata of the value; methods of a tensor, by their rules."""
        if name in {"shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_nested", "requires_grad"}:
            return getattr(self.value, name)
        method = getattr(Tensor, name)
        if not callable(method) or name.startswith("__"):
            raise AttributeError(f"sprint.maths.dual: a Dual has no {name!r}")
        return partial(_apply, method, self)

    def __rtruediv__(self, other):
        return self.reciprocal() * other  # as torch does it

    __getitem__, __neg__ = _operator(Tensor.__getitem__), _operator(torch.neg)
    __add__ = __radd__ = _operator(torch.add)
    __mul__ = __rmul__ = _operator(torch.mul)
    __sub__, __rsub__ = _operator(torch.sub), _operator(torch.rsub)
    __truediv__, __pow__, __matmul__ = map(_operator, (torch.div, torch.pow, torch.matmul))
    __lt__, __le__, __gt__, __ge__ = map(_operator, (torch.lt, torch.le, torch.gt, torch.ge))
    __eq__, __ne__, __hash__ = _operator(torch.eq), _operator(torch.ne), object.__hash__
    __len__ = __bool__ = __contains__ = __setitem__ = _refused
    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ipow__ = __imatmul__ = _refused


def value_and_tangent(
    F: Callable[[Tensor, Tensor], Tensor], x_hat: Tensor, t: Tensor, v_x: Tensor, v_t: Tensor
) -> tuple[Tensor, Tensor]:
    """F(x_hat, t) with its autograd graph, and dF = ∂F/∂x · v_x + ∂F/∂t · v_t without any, in one pass.

    F may be any function or module of PyTorch operations that have a rule here; v_x has x_hat's shape and
    dtype, v_t has t's.  -> value, tangent, both shaped like F's output
    Raises NotImplementedError for an operation without a rule, ValueError for a direction of another shape or
    dtype, TypeError if what F gives is no tensor that depends on its inputs.
    """
    for x, v in ((x_hat, v_x), (t, v_t)):
        if (x.shape, x.dtype) != (v.shape, v.dtype) or not x.is_floating_point():
            raise ValueError(f"sprint.maths.dual: direction {v.dtype} {[*v.shape]} at {x.dtype} {[*x.shape]}")
    out = F(Dual(x_hat, v_x), Dual(t, v_t))
    if not isinstance(out, Dual):
        raise TypeError(
            f"sprint.maths.dual: F gave a {type(out).__name__}, no tensor that depends on its inputs"
        )
    return out.value, out.tangent


def _apply(function: Callable, *args, **kwargs):
    """`function` of arguments of which at least one is a Dual, by its rule."""
    name = function.__name__
    if name not in RULES:
        owner = getattr(function, "__module__", None) or "torch.Tensor"
        raise _missing(f"no rule for {owner}.{name}; add one to RULES in sprint/maths/dual.py")
    if kwargs.pop("inplace", False) or "out" in kwargs:
        raise _missing(f"no rule for {name} in place")
    if not torch.is_grad_enabled() and args and isinstance(args[0], Dual) and args[0].value.requires_grad:
        raise RuntimeError(
            f"sprint.maths.dual: {name} under no_grad would cut the graph (reentrant checkpoint?)"
        )
    return RULES[name](function, *args, **kwargs)


def _missing(what: str) -> NotImplementedError:
    return NotImplementedError(f"sprint.maths.dual: {what}")


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Dual) else x


def _dual(value: Tensor, tangent: Tensor) -> Dual:
    """A Dual whose tangent has the value's shape and dtype, where broadcasting or promotion left it behind."""
    if tangent.dtype != value.dtype:
        tangent = tangent.to(value.dtype)
    if tangent.shape != value.shape:
        tangent = tangent.expand(value.shape)
    return Dual(value, tangent)


# ---- linear in the input ----------------------------------------------------------------------------------


def linear(function, x, *args, **kwargs):
    """dy = f(dx). One tensor or several come out."""
    y = function(x.value, *args, **kwargs)
    with torch.no_grad():
        dy = function(x.tangent, *args, **kwargs)
    return Dual(y, dy) if isinstance(y, Tensor) else tuple(map(Dual, y, dy))


def projection(function, x, weight, bias=None, *args, **kwargs):
    """y = W·x + b, as a matrix or a convolution; dy = W·dx."""
    y = function(x.value, weight, bias, *args, **kwargs)
    with torch.no_grad():
        return Dual(y, function(x.tangent, weight, None, *args, **kwargs))


def like_other(function, x, *args, **kwargs):
    """Casts and `expand_as`: of another tensor only shape, dtype and device matter."""
    args = tuple(map(value_of, args))
    y = function(value_of(x), *args, **kwargs)
    if not isinstance(x, Dual):
        return y
    if not y.is_floating_point() and not y.is_complex():
        raise _missing(f"{function.__name__} {y.dtype} has no tangent")
    return Dual(y, function(x.tangent, *args, **kwargs))


def concatenate(function, tensors, *args, **kwargs):
    """`cat`, `stack`; parts that are no Dual have zero tangent."""
    y = function([value_of(x) for x in tensors], *args, **kwargs)
    with torch.no_grad():
        parts = [x.tangent if isinstance(x, Dual) else torch.zeros_like(x) for x in tensors]
        return _dual(y, function(parts, *args, **kwargs))


def where(function, condition, a, b):
    """The branch taken has the tangent."""
    if function is Tensor.where:  # a.where(condition, b)
        condition, a = a, condition
    y = torch.where(value_of(condition), value_of(a), value_of(b))
    zero = torch.zeros((), dtype=y.dtype, device=y.device)
    da, db = (x.tangent if isinstance(x, Dual) else zero for x in (a, b))
    return _dual(y, torch.where(condition, da, db))


def dropout(function, x, p=0.5, training=True):
    if training and p > 0:
        raise _missing("dropout in training has no tangent; set its probability to 0")
    return x


def of_the_value(function, *args, **kwargs):
    """Comparisons, metadata, new tensors: piecewise constant, so no Dual comes out."""
    return function(*map(value_of, args), **kwargs)


# ---- two inputs -------------------------------------------------------------------------------------------


def add(function, a, b, *, alpha=1):
    """d(a + α·b) = da + α·db; `sub` has −α."""
    y = function(value_of(a), value_of(b), alpha=alpha)
    sign = -alpha if function.__name__ in ("sub", "subtract") else alpha
    if not isinstance(b, Dual):
        return _dual(y, a.tangent)
    if not isinstance(a, Dual):
        return _dual(y, b.tangent if sign == 1 else sign * b.tangent)
    return _dual(y, torch.add(a.tangent, b.tangent, alpha=sign))


def product(function, a, b):
    """d(a·b) = da·b + a·db, for `mul`, `matmul` and every other bilinear function of two tensors."""
    x, z = value_of(a), value_of(b)
    y = function(x, z)
    with torch.no_grad():
        if not isinstance(a, Dual):
            return _dual(y, function(x, b.tangent))
        dy = function(a.tangent, z)
        if isinstance(b, Dual):
            by_element = function.__name__ in ("mul", "multiply")
            dy = torch.addcmul(dy, x, b.tangent) if by_element else dy.add_(function(x, b.tangent))
        return _dual(y, dy)


def einsum(function, equation, *operands):
    """Linear in each operand."""
    values = [value_of(x) for x in operands]
    y = function(equation, *values)
    with torch.no_grad():
        duals = [i for i, x in enumerate(operands) if isinstance(x, Dual)]
        terms = [function(equation, *values[:i], operands[i].tangent, *values[i + 1 :]) for i in duals]
        return _dual(y, sum(terms[1:], start=terms[0]))


def quotient(function, a, b):
    """d(a/b) = (da − y·db)/b."""
    x, z = value_of(a), value_of(b)
    y = function(x, z)
    with torch.no_grad():
        if not isinstance(b, Dual):
            return _dual(y, a.tangent / z)
        dy = torch.addcmul(a.tangent, y, b.tangent, value=-1) if isinstance(a, Dual) else -y * b.tangent
        return _dual(y, dy.div_(z))


# ---- f'(x)·dx, and other functions of one tensor ------------------------------------------------------------


def derivative(of: Callable) -> Callable:
    """The rule of y = f(x, *options), from of(dx, x, y, *options) = J·dx."""

    def rule(function, x, *args, **kwargs):
        y = function(x.value, *args, **kwargs)
        if x.value.is_complex():
            raise _missing(f"{function.__name__} of complex numbers has no rule")
        with torch.no_grad():
            return _dual(y, of(x.tangent, x.value, y, *args, **kwargs))

    return rule


def view(dx, x, y, *shape):
    """The tangent may lie otherwise in memory than the value, and is copied if it must."""
    if x.dtype != y.dtype:
        raise _missing("a view of a tensor's bits has no tangent")
    return dx.reshape(y.shape)


def power(dx, x, y, exponent):
    """n·xⁿ⁻¹·dx for a number n."""
    if isinstance(exponent, Tensor):
        raise _missing("pow has a rule for numbers as exponents only")
    slope = x if exponent == 2 else x ** (exponent - 1 if exponent else 0)
    return torch.mul(slope, dx).mul_(exponent)


def softmax(dx, x, y, dim, dtype=None, _stacklevel=3):
    """y∘(dx − Σ y∘dx)."""
    return aten._softmax_backward_data(dx.to(y.dtype), y, dim, y.dtype)


def rms_norm(dx, x, y, normalized_shape, weight=None, eps=None):
    """w·r·(dx − n·mean(n·dx)), r = 1/√(mean x² + ε), n = r·x."""
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    x, dx = (z.to(torch.promote_types(x.dtype, torch.float32)) for z in (x, dx))
    r = torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
    n = r * x
    dn = r * (dx - n * (n * dx).mean(axes, keepdim=True))
    return dn if weight is None else dn * weight


def layer_norm(function, x, normalized_shape, weight=None, bias=None, eps=1e-5):
    """dy = w·σ⁻¹·(dx − mean dx − n·mean(n·dx)), n the normalised x."""
    shape = list(normalized_shape)
    y, mean, rstd = torch.native_layer_norm(x.value, shape, weight, bias, eps)  # what `function` calls
    with torch.no_grad():
        v, dv = (z.to(y.dtype).contiguous() for z in (x.value, x.tangent))
        dn, _, _ = aten.native_layer_norm_backward(dv, v, shape, mean, rstd, None, None, [True, False, False])
        return _dual(y, dn if weight is None else dn * weight)


# ---- attention --------------------------------------------------------------------------------------------


def attention(
    function, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Softmax attention: the value by whichever fused kernel is fastest, the tangent by its closed form.

    P = softmax(scale·QKᵀ + mask), O = PV, dS = scale·(dQ·Kᵀ + Q·dKᵀ): dO = (P∘(dS − Σ P∘dS))·V + P·dV.
    Keys and values that are no Dual (a text) have no tangent, and their terms fall away.
    """
    if dropout_p > 0 or enable_gqa or isinstance(attn_mask, Dual):
        raise _missing("attention with dropout, grouped queries or a Dual mask has no rule")
    tensors = (query, key, value)
    y = function(*map(value_of, tensors), attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
        q, k, v = (value_of(x).to(y.dtype) for x in tensors)
        dq, dk, dv = (x.tangent.to(y.dtype) if isinstance(x, Dual) else None for x in tensors)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        k, dk = (None if z is None else (z * scale).transpose(-2, -1) for z in (k, dk))
        if is_causal:
            attn_mask = torch.ones(y.shape[-2], k.shape[-1], dtype=torch.bool, device=y.device).tril()
        S = q @ k
        if attn_mask is not None:
            S = S.masked_fill_(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else S.add_(attn_mask)
        P = torch.softmax(S, dim=-1)
        terms = [] if dv is None else [P @ dv]
        if dq is not None or dk is not None:
            dS = q @ dk if dq is None else dq @ k if dk is None else (dq @ k).add_(q @ dk)
            terms.append(aten._softmax_backward_data(dS, P, -1, P.dtype) @ v)
        dO = sum(terms[1:], start=terms[0])
        if attn_mask is not None:  # a query that may see no key is NaN here; its output is zero
            hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
            dO = dO.masked_fill_(hidden.all(-1, keepdim=True), 0)
        return _dual(y, dO)


# ---- the table --------------------------------------------------------------------------------------------


def first_only(rule: Callable) -> Callable:
    """The rule for a Dual as first argument and nowhere else."""

    def checked(function, x, *args, **kwargs):
        if not isinstance(x, Dual) or any(isinstance(other, Dual) for other in (*args, *kwargs.values())):
            raise _missing(f"{function.__name__} has a rule for a Dual as its first argument only")
        return rule(function, x, *args, **kwargs)

    return checked


ANYWHERE: dict[str, Callable] = {
    "to float double half bfloat16 expand_as reshape_as type_as": like_other,
    "cat concat concatenate stack": concatenate,
    "where": where,
    "size dim numel stride is_contiguous is_floating_point is_complex element_size": of_the_value,
    "eq ne lt le gt ge isnan isinf isfinite zeros_like ones_like new_zeros": of_the_value,
    "add sub subtract": add,
    "mul multiply matmul bmm mm outer": product,
    "einsum": einsum,
    "div divide true_divide": quotient,
    "scaled_dot_product_attention": attention,
}
FIRST: dict[str, Callable] = {
    "reshape flatten unflatten squeeze unsqueeze expand repeat repeat_interleave tile": linear,
    "permute transpose movedim swapaxes swapdims moveaxis contiguous clone roll flip": linear,
    "chunk split split_with_sizes tensor_split unbind": linear,
    "__getitem__ select narrow index_select view_as_real sum mean cumsum neg negative": linear,
    "linear onednn_linear bf16_linear depthwise conv1d conv2d conv3d": projection,
    "dropout": dropout,
    "layer_norm": layer_norm,
}
DERIVATIVES: dict[str, Callable] = {
    "view": view,
    "pow": power,
    "softmax": softmax,
    "rms_norm": rms_norm,
    "view_as_complex": lambda dx, x, y: torch.view_as_complex(dx.contiguous()),
    "pad": lambda dx, x, y, pad, mode="constant", value=None: torch.nn.functional.pad(dx, pad, mode),
    "masked_fill": lambda dx, x, y, mask, value: dx.masked_fill(mask, 0),
    "rsub": lambda dx, x, y, number: -dx,
    "square": lambda dx, x, y: 2 * x * dx,
    "sqrt": lambda dx, x, y: dx / (2 * y),
    "rsqrt": lambda dx, x, y: -0.5 * y**3 * dx,
    "reciprocal": lambda dx, x, y: -(y**2) * dx,
    "exp": lambda dx, x, y: y * dx,
    "log": lambda dx, x, y: dx / x,
    "sin": lambda dx, x, y: torch.cos(x) * dx,
    "cos": lambda dx, x, y: -torch.sin(x) * dx,
    "tanh": lambda dx, x, y: aten.tanh_backward(dx, y),
    "sigmoid": lambda dx, x, y: aten.sigmoid_backward(dx, y),
    "silu": lambda dx, x, y: aten.silu_backward(dx, x),
    "relu": lambda dx, x, y: aten.threshold_backward(dx, y, 0),
    "gelu": lambda dx, x, y, approximate="none": aten.gelu_backward(dx, x, approximate=approximate),
    "clamp clip": lambda dx, x, y, *bounds, **named: torch.where(y == x, dx, 0),
}
RULES = {name: rule for names, rule in ANYWHERE.items() for name in names.split()}
RULES |= {name: first_only(rule) for names, rule in FIRST.items() for name in names.split()}
RULES |= {name: first_only(derivative(of)) for names, of in DERIVATIVES.items() for name in names.split()}
