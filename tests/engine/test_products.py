"""An engine's products: in bf16 where that is asked for and faster here, in the blocks and nowhere else."""

import pytest
import torch

from sprint.base.products import Product, bf16_linear, fastest_products, float32_products
from sprint.engine import engine as engines
from sprint.engine.engine import Engine
from sprint.models.sana.layout import LinearAttention
from sprint.recipe.schema import Precision, Products
from sprint.train.distill import DistillStage
from tests.tiny import LATENT, tiny_batch, tiny_network, tiny_null, tiny_recipe
from tests.tolerance import of_autocast


@pytest.fixture
def fast_in_bf16(monkeypatch):
    monkeypatch.setattr(engines, "fastest_products", lambda: bf16_linear)


def multiplies_in_bf16(network) -> set[str]:
    return {
        name
        for name, module in network.named_modules()
        if isinstance(module.__dict__.get("forward"), Product) and module.forward.multiply is bf16_linear
    }


def test_blocks_alone(fast_in_bf16):
    engine = Engine(Precision.fp32, products=Products.fastest)
    stage = DistillStage(tiny_recipe(), engine, tiny_network(), tiny_null(), LATENT)
    for network in (stage.student.network, stage.teacher.network):
        names = multiplies_in_bf16(network)
        assert names and all(name.startswith("transformer_blocks.") for name in names)
        assert isinstance(network.transformer_blocks[0].attn1.processor, LinearAttention)
    assert "bf16" in str(engine)


def test_unasked_nothing_multiplies_in_bf16(fast_in_bf16):
    engine = Engine(Precision.fp32)
    stage = DistillStage(tiny_recipe(), engine, tiny_network(), tiny_null(), LATENT)
    assert not multiplies_in_bf16(stage.student.network) and "bf16" not in str(engine)


def test_losses_are_nearly_the_same(fast_in_bf16):
    seen = {}
    for products in Products:
        engine = Engine(Precision.fp32, products=products)
        stage = DistillStage(tiny_recipe(), engine, tiny_network(), tiny_null(), LATENT)
        seen[products] = [stage.update(step, tiny_batch()).read(engine)["loss"] for step in range(4)]
    far = max(abs(a - b) / abs(a) for a, b in zip(*seen.values(), strict=True))
    assert 0 < far < of_autocast(tiny_network())


def test_what_is_fastest_is_measured_once_and_one_of_two():
    assert fastest_products() is fastest_products()
    assert fastest_products() in (bf16_linear, float32_products())


def test_a_linear_layer_gives_and_takes_its_inputs_dtype():
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(2, 8, requires_grad=True)
    y = bf16_linear(x, layer.weight, layer.bias)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == torch.float32


def test_bf16_everywhere_leaves_products_alone(fast_in_bf16, bf16_engine):
    assert bf16_engine._products(Products.fastest) is float32_products()


def test_the_main_process_says_for_all_which_is_fastest(fast_in_bf16, monkeypatch):
    monkeypatch.setattr(
        Engine, "broadcast_from_main", lambda self, work: None
    )  # its clock found float32 faster
    assert Engine(Precision.fp32, products=Products.fastest).multiply is float32_products()
