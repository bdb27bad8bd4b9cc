"""Who is measured against whom: diffusers' own network and ours, by what multiplies.

    plain                        diffusers' own forwards, torch's own products: what pip gives
    plain, same fp32 products    the same forwards; linear layers by the library that ours takes in float32
    plain, same products         the same forwards; products of blocks as products=fastest has them
    ours                         the trainer's engine with products=exact
    ours, fastest                with products=fastest
    ours, compiled               with products=fastest and compile=true

What would multiply as another variant does is left out: where torch's own products are already the best in float32,
and where a processor gains nothing from bf16. Imported by the benchmarks beside it; not a program.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from sprint.base.products import (
    Multiply,
    bf16_linear,
    fastest_products,
    float32_products,
    use_products,
)
from sprint.engine.engine import Engine
from sprint.models.families import family_of, networks_in
from sprint.recipe.schema import Products
from tools.bench.measure import Request, engine_of


class Variant(NamedTuple):
    """ours: run as the trainer runs it, else as diffusers wrote it; products: None for torch's own"""

    name: str
    ours: bool
    products: Products | None
    compiled: bool = False

    def multiply(self) -> Multiply:
        """What multiplies in blocks on a CPU."""
        if self.products is None:
            return linear
        return fastest_products() if self.products is Products.fastest else float32_products()

    def engine(self, request: Request) -> Engine:
        return engine_of(request._replace(products=self.products or Products.exact))

    def hasten(self, engine: Engine, module: nn.Module) -> None:
        """Prepare the networks inside `module`, which lie on the engine's device."""
        if self.ours:
            engine.hasten(module)
        elif self.products is not None:
            change_products_alone(module, self.multiply())


PLAIN = Variant("plain", False, None)
OURS = Variant("ours", True, Products.exact)
FASTEST = Variant("ours, fastest", True, Products.fastest)
COMPILED = Variant("ours, compiled", True, Products.fastest, compiled=True)
ALL = (
    PLAIN,
    Variant("plain, same fp32 products", False, Products.exact),
    Variant("plain, same products", False, Products.fastest),
    OURS,
    FASTEST,
    COMPILED,
)


def variants_of(device: str, compiled: bool) -> tuple[Variant, ...]:
    """Those that differ on this machine; on a GPU all multiply alike."""
    kept: dict[tuple, Variant] = {}
    for variant in ALL if compiled else ALL[:-1]:
        multiply = linear if device == "cuda" else variant.multiply()
        kept.setdefault((variant.ours, variant.compiled, multiply), variant)
    return tuple(kept.values())


def rivals_of(variant: Variant, among: tuple[Variant, ...], device: str) -> tuple[Variant, ...]:
    """Whom one of ours is held against: what pip gives, and what multiplies as it does, if that is another."""
    plain = [each for each in among if not each.ours]
    same = [each for each in plain if device == "cpu" and each.multiply() is variant.multiply()]
    return (PLAIN, *(each for each in same if each is not PLAIN))


# ---- the products of ours under diffusers' own forwards -------------------------------------------------


class Bf16Convolution:
    """A 1×1 convolution's forward on a picture, of bf16 factors as `bf16_linear` has them."""

    def __init__(self, layer: nn.Conv2d):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        y = conv2d(x.to(torch.bfloat16), self.layer.weight.to(torch.bfloat16)).to(x.dtype)
        bias = self.layer.bias
        return y if bias is None else y + bias[:, None, None]


def change_products_alone(module: nn.Module, multiply: Multiply) -> None:
    """Have linear layers multiply as the engine's do, in blocks by `multiply`; order in memory is diffusers'.

    1×1 convolutions, which are products too, take bf16 factors where linear layers do; in float32 they are oneDNN's
    anyway.
    """
    use_products(module)
    for network in networks_in(module):
        blocks = family_of(network).blocks(network)
        use_products(blocks, multiply)
        for layer in blocks.modules() if multiply is bf16_linear else ():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
                layer.forward = Bf16Convolution(layer)
