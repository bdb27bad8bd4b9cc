"""The key table against diffusers' class and against rows written out by hand."""

import pytest
import torch

from sprint.base.errors import SprintError
from sprint.models.sana.keys import KEYS
from sprint.models.sana.presets import PRESETS, config_from_shapes, network_shapes, sizes, transformer_config
from sprint.weights.keys import (
    Rule,
    as_diffusers_shapes,
    expected_shapes,
    extra_shapes,
    find_layout,
    original_name,
    rules_for,
)

BY_HAND = {  # original -> diffusers, of a base teacher
    "x_embedder.proj.bias": ["patch_embed.proj.bias"],
    "y_embedder.y_proj.fc2.weight": ["caption_projection.linear_2.weight"],
    "attention_y_norm.weight": ["caption_norm.weight"],
    "t_embedder.mlp.0.weight": ["time_embed.emb.timestep_embedder.linear_1.weight"],
    "t_embedder.mlp.2.bias": ["time_embed.emb.timestep_embedder.linear_2.bias"],
    "t_block.1.weight": ["time_embed.linear.weight"],
    "blocks.1.scale_shift_table": ["transformer_blocks.1.scale_shift_table"],
    "blocks.1.attn.qkv.weight": [f"transformer_blocks.1.attn1.to_{x}.weight" for x in "qkv"],
    "blocks.1.attn.proj.bias": ["transformer_blocks.1.attn1.to_out.0.bias"],
    "blocks.1.cross_attn.q_linear.bias": ["transformer_blocks.1.attn2.to_q.bias"],
    "blocks.1.cross_attn.kv_linear.bias": [f"transformer_blocks.1.attn2.to_{x}.bias" for x in "kv"],
    "blocks.1.cross_attn.proj.weight": ["transformer_blocks.1.attn2.to_out.0.weight"],
    "blocks.1.mlp.inverted_conv.conv.weight": ["transformer_blocks.1.ff.conv_inverted.weight"],
    "blocks.1.mlp.depth_conv.conv.bias": ["transformer_blocks.1.ff.conv_depth.bias"],
    "blocks.1.mlp.point_conv.conv.weight": ["transformer_blocks.1.ff.conv_point.weight"],
    "final_layer.linear.weight": ["proj_out.weight"],
    "final_layer.scale_shift_table": ["scale_shift_table"],
}
BY_HAND_STUDENT = {
    "t_embedder.mlp.0.weight": ["time_embed.timestep_embedder.linear_1.weight"],
    "cfg_embedder.mlp.2.bias": ["time_embed.guidance_embedder.linear_2.bias"],
    "blocks.0.attn.q_norm.weight": ["transformer_blocks.0.attn1.norm_q.weight"],
    "blocks.0.attn.k_norm.weight": ["transformer_blocks.0.attn1.norm_k.weight"],
    "blocks.0.cross_attn.q_norm.weight": ["transformer_blocks.0.attn2.norm_q.weight"],
    "blocks.0.cross_attn.k_norm.weight": ["transformer_blocks.0.attn2.norm_k.weight"],
}


def table(**traits) -> dict[str, list[str]]:
    rules = rules_for(KEYS, network_shapes(transformer_config("tiny", **traits)))
    return {rule.original: list(rule.diffusers) for rule in rules}


def test_rows_by_hand():
    teacher, student = table(), table(qk_norm=True, guidance_embeds=True)
    assert {key: teacher[key] for key in BY_HAND} == BY_HAND
    assert {key: student[key] for key in BY_HAND_STUDENT} == BY_HAND_STUDENT
    assert not any("norm_q" in name or "guidance" in name for names in teacher.values() for name in names)


@pytest.mark.parametrize("size", PRESETS)
@pytest.mark.parametrize(("qk_norm", "guidance"), [(False, False), (True, False), (True, True)])
def test_every_key_of_the_class_once(size, qk_norm, guidance):
    network = network_shapes(transformer_config(size, qk_norm, guidance))
    rules = rules_for(KEYS, network)
    names = [name for rule in rules for name in rule.diffusers]
    originals = [rule.original for rule in rules]
    assert sorted(names) == sorted(network)
    assert len(set(originals)) == len(originals)
    assert expected_shapes(rules, network, "diffusers") == network


def test_original_shapes_of_the_0_6b():
    network = network_shapes(transformer_config("0.6b"))
    shapes = expected_shapes(rules_for(KEYS, network), network, "original")
    assert shapes["blocks.27.attn.qkv.weight"] == (3456, 1152)
    assert shapes["blocks.27.cross_attn.kv_linear.weight"] == (2304, 1152)
    assert shapes["blocks.27.mlp.inverted_conv.conv.weight"] == (5760, 1152, 1, 1)
    assert shapes["y_embedder.y_proj.fc1.weight"] == (1152, 2304)
    assert extra_shapes(KEYS, sizes(transformer_config("0.6b")))["pos_embed"] == (1, None, 1152)
    assert find_layout(KEYS, shapes) == "original"
    assert config_from_shapes(as_diffusers_shapes(KEYS, shapes)) == transformer_config("0.6b")


def test_split_and_join_are_inverse():
    rule = Rule("qkv", ("q", "k", "v"))
    qkv = torch.arange(18.0).reshape(6, 3)
    q, k, v = rule.map((qkv,), "original", "diffusers")
    assert q.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert k.tolist() == [[6, 7, 8], [9, 10, 11]]
    assert v.tolist() == [[12, 13, 14], [15, 16, 17]]
    assert torch.equal(*rule.map((q, k, v), "diffusers", "original"), qkv)
    with pytest.raises(SprintError, match="q and k and v have different dtypes"):
        rule.join((q, k, v.half()))


def test_names_for_messages_and_layouts():
    assert original_name(KEYS, "transformer_blocks.3.attn2.to_v.bias") == "blocks.3.cross_attn.kv_linear.bias"
    assert original_name(KEYS, "proj_out.weight") == "final_layer.linear.weight"
    assert find_layout(KEYS, network_shapes(transformer_config("tiny"))) == "diffusers"
    assert find_layout(KEYS, ["model.layers.0.mlp.weight", "pos_embed"]) is None
    assert find_layout(KEYS, []) is None
