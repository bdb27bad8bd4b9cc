"""Sizes: parameter counts of the papers, and configs read back from shapes."""

import pytest

from sprint.base.errors import SprintError
from sprint.models.sana.presets import (
    PRESETS,
    config_from_shapes,
    count_logvar_parameters,
    count_parameters,
    network_shapes,
    transformer_config,
)

COUNTS = [  # size, plain, with QK-norm, student with guidance embedder and logvar head
    ("0.6b", 591_747_872, 591_876_896, 593_502_369),
    ("1.6b", 1_604_462_752, 1_604_641_952, 1_610_239_713),
    ("4.8b", 4_721_288_352, 4_721_825_952, None),
]


@pytest.mark.parametrize(("size", "plain", "normed", "student"), COUNTS)
def test_parameter_counts(size, plain, normed, student):
    assert count_parameters(transformer_config(size)) == plain
    assert count_parameters(transformer_config(size, qk_norm=True)) == normed
    if student:
        config = transformer_config(size, qk_norm=True, guidance_embeds=True)
        assert count_parameters(config) + count_logvar_parameters(config) == student


@pytest.mark.parametrize("size", PRESETS)
@pytest.mark.parametrize(("qk_norm", "guidance"), [(False, False), (True, False), (True, True)])
def test_shapes_give_the_config_back(size, qk_norm, guidance):
    config = transformer_config(size, qk_norm, guidance)
    assert config_from_shapes(network_shapes(config)) == config


@pytest.mark.parametrize(
    ("depth", "mlp_ratio", "patch_size", "caption_channels"), [(1, 3.0, 2, 48), (9, 0.7, 1, 5)]
)
def test_shapes_give_any_consistent_size(depth, mlp_ratio, patch_size, caption_channels):
    config = transformer_config("tiny") | {
        "num_layers": depth,
        "mlp_ratio": mlp_ratio,
        "patch_size": patch_size,
        "caption_channels": caption_channels,
        "attention_bias": True,
    }
    shapes = network_shapes(config)
    found = config_from_shapes(shapes)
    assert network_shapes(found) == shapes
    assert found | {"mlp_ratio": mlp_ratio} == config


def test_heads_of_an_unknown_width_are_asked_for():
    shapes = network_shapes(
        transformer_config("tiny")
        | {"num_attention_heads": 3, "cross_attention_dim": 96, "cross_attention_head_dim": 24}
    )
    with pytest.raises(SprintError, match=r"width 96 is no known size.*--cross-attention-heads"):
        config_from_shapes(shapes)
    assert config_from_shapes(shapes, cross_attention_heads=2)["cross_attention_head_dim"] == 48
    with pytest.raises(SprintError, match="--cross-attention-heads 7 does not divide the width 96"):
        config_from_shapes(shapes, cross_attention_heads=7)


def test_unknown_size():
    with pytest.raises(SprintError, match="no size named '7b'; choose one of tiny, "):
        transformer_config("7b")
