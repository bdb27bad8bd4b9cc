"""Where a network lies in a file: found under every key and prefix that trainers and bundles put around it."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from sprint.base.errors import SprintError
from sprint.weights.convert import describe
from sprint.weights.sources import Reader, open_source
from tests.weights.convert_cases import quiet, refuses, same_bits

pytest_plugins = "tests.weights.convert_fixtures"

PREFIXES = (
    *(
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "_fsdp_wrapped_module.",
        "_forward_module.",
    ),
    *("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "student.", "my_model.dit."),
)
BUNDLED = (
    "vae.decoder.conv.weight",
    "text_encoders.gemma2.embed.weight",
    "first_stage_model.a",
    "conditioner.b.c",
)


def read(name: str, **choice) -> dict[str, torch.Tensor]:
    source = open_source(name, **choice)
    reader = Reader(source)
    return {key: reader[key] for key in source.entries}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_prefixes_come_off(here, net, original, prefix, layout):
    state = original if layout == "original" else dict(net.state_dict())
    save_file({prefix + key: tensor for key, tensor in state.items()}, "a.safetensors")
    torch.save({"state_dict": {prefix + key: tensor for key, tensor in state.items()}}, "a.pth")
    for name in ("a.safetensors", "a.pth"):
        assert same_bits(read(name), state)
        assert sorted("".join(open_source(name).unwrapped).split(".")) == sorted(prefix.split("."))


def test_blocks_that_were_compiled_one_by_one(here, net):
    wrapped = copy.deepcopy(net)
    for i, block in enumerate(wrapped.transformer_blocks):
        wrapped.transformer_blocks[i] = torch.compile(block)
    torch.save({"model": torch.compile(wrapped).state_dict(), "step": 3}, "a.pth")
    result = quiet("a.pth", "out")
    assert same_bits(load_file("out/diffusion_pytorch_model.safetensors"), dict(net.state_dict()))
    told = describe(result)
    assert "weights: model\ntaken off the names: _orig_mod.\nleft out: step\n" in told


def test_wrappers_in_the_middle_of_names(here, original):
    between = "_fsdp_wrapped_module._checkpoint_wrapped_module."
    state = {re.sub(r"^(blocks\.\d+\.)", rf"\1{between}", key): tensor for key, tensor in original.items()}
    save_file({f"_fsdp_wrapped_module.{key}": tensor for key, tensor in state.items()}, "a.safetensors")
    assert same_bits(read("a.safetensors"), original)


def test_the_rest_of_a_bundle_is_left_out_and_said(here, original):
    for prefix in ("", "model.diffusion_model."):
        bundle = {prefix + key: tensor for key, tensor in original.items()} | {
            key: torch.ones(2) for key in BUNDLED
        }
        save_file(bundle, "bundle.safetensors")
        assert same_bits(read("bundle.safetensors"), original)
        assert open_source("bundle.safetensors").ignored == [
            "conditioner",
            "first_stage_model",
            "text_encoders",
            "vae",
        ]


@pytest.mark.parametrize(
    "path", ["model", "ema", "generator", "module", "state_dict_ema", "model.state_dict", "a.b.c.d"]
)
def test_the_only_network_is_taken_wherever_it_lies(here, original, path):
    content = original
    for key in reversed(path.split(".")):
        content = {key: content, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "step": 3}
    torch.save(content, "a.pth")
    source = open_source("a.pth")
    assert same_bits(read("a.pth"), original)
    assert source.prefix == path and {"optimizer", "step"} <= set(source.ignored)


def test_of_several_networks_one_is_chosen(here, original):
    average = {key: tensor * 1.01 for key, tensor in original.items()}
    torch.save(
        {"state_dict": original, "ema": {"shadow": {f"module.{k}": t for k, t in average.items()}}}, "a.pth"
    )
    count = len(original)
    refuses(
        here,
        rf"a.pth holds 2 networks: state_dict \({count} tensors\), ema.shadow.module \({count} tensors\); "
        "choose one with --weights KEY",
        "a.pth",
        "out",
    )
    assert same_bits(read("a.pth", weights="state_dict"), original)
    for key in ("ema.shadow.module", "ema.shadow", "ema"):
        assert same_bits(read("a.pth", weights=key), average)
    refuses(
        here,
        "a.pth has no network at --weights nowhere; it holds state_dict",
        "a.pth",
        "out",
        weights="nowhere",
    )
    result = quiet("a.pth", "out", weights="ema")
    assert result["source"]["prefix"] == "ema.shadow" and result["source"]["ignored"] == ["state_dict"]


def test_networks_of_one_flat_file_are_told_apart(here, original):
    average = {key: tensor * 1.01 for key, tensor in original.items()}
    both = {f"online_model.{key}": tensor for key, tensor in original.items()}
    both |= {f"ema_model.{key}": tensor for key, tensor in average.items()}
    save_file(both | {"initted": torch.tensor(True)}, "a.safetensors")
    assert same_bits(read("a.safetensors", weights="ema_model"), average)
    assert open_source("a.safetensors", weights="ema_model").ignored == ["initted", "online_model"]
    save_file(original | {f"ema.{key}": tensor for key, tensor in average.items()}, "b.safetensors")
    assert same_bits(read("b.safetensors", weights="."), original)
    assert same_bits(read("b.safetensors", weights="ema"), average)


def test_small_relatives_are_no_second_network(here, original):
    critic = {f"heads.{i}.weight": torch.ones(2) for i in range(9)} | {"pos_embed": torch.ones(1, 4, 128)}
    torch.save({"generator": original, "critic": critic}, "a.pth")
    assert open_source("a.pth").ignored == ["critic"]


def test_the_same_dict_under_two_keys_is_one_network(here, original):
    torch.save({"model": original, "state_dict": original}, "a.pth")
    assert same_bits(read("a.pth"), original)


def test_counters_beside_weights_are_left_out(here, original):
    torch.save(original | {"num_updates": torch.tensor(7), "lr": 0.1}, "a.pth")
    assert open_source("a.pth").ignored == ["num_updates", "lr"]
    save_file(original | {"num_updates": torch.tensor([7])}, "a.safetensors")
    assert open_source("a.safetensors").ignored == ["num_updates"]


def test_two_tensors_of_one_name_are_an_error(here, original):
    key = "x_embedder.proj.weight"
    save_file(original | {f"_orig_mod.{key}": original[key] + 1}, "a.safetensors")
    refuses(here, f"{key} have one name, {key}, once their wrappers are off", "a.safetensors", "out")


def test_shards_are_one_network(here, original):
    keys = sorted(original)
    for i, part in enumerate((keys[::2], keys[1::2])):
        torch.save(
            {f"module.{key}": original[key] for key in part}, f"pytorch_model-0000{i + 1}-of-00002.bin"
        )
    assert same_bits(read("."), original)


def test_names_of_any_length_are_no_trouble(here):
    save_file({"a." * 20_000: torch.ones(1), "b": torch.ones(1)}, "a.safetensors")
    with pytest.raises(SprintError, match=r"a.safetensors is not a Sana transformer"):
        open_source("a.safetensors")


def test_blocks_without_end_are_refused_before_anything_is_built(here):
    save_file({f"blocks.{i}.attn.proj.bias": torch.ones(1) for i in range(4001)}, "a.safetensors")
    refuses(here, "a.safetensors holds 4,001 tensors; a network has at most 4,000", "a.safetensors", "out")


STRANGERS = {
    "a LoRA: merge it": "transformer_blocks.0.attn1.to_q.lora_A.weight",
    "a LoRA": "lora_unet_blocks_0_attn_qkv.lora_down.weight",
    "a DoRA": "transformer_blocks.0.attn1.to_q.lora_magnitude_vector",
    "a LoKr or LoHa": "lycoris_blocks_0_attn.lokr_w1",
    "a model that PEFT wraps.*merge_and_unload": "base_model.model.transformer_blocks.0.attn1.to_q.base_layer.weight",
    "an autoencoder": "decoder.up_blocks.0.resnets.0.conv1.weight",
    "a text encoder": "model.layers.0.self_attn.q_proj.weight",
    "a ControlNet": "controlnet_blocks.0.weight",
    "FLUX": "double_blocks.0.img_attn.qkv.weight",
    "a UNet": "input_blocks.0.0.weight",
    "a whole Stable Diffusion or SDXL checkpoint": "conditioner.embedders.0.transformer.text_model.embeddings.weight",
    "a quantised model": "blocks.0.foo.qweight",
    "an optimizer's state": "param_groups.0.exp_avg",
    "a part of an FSDP checkpoint": "_fsdp_wrapped_module._flat_param",
    "its keys are like zzz": "zzz",
}


@pytest.mark.parametrize("words", STRANGERS)
def test_strangers_are_named_for_what_they_look_like(here, words):
    save_file({STRANGERS[words]: torch.ones(2)}, "a.safetensors")
    refuses(here, f"a.safetensors is not a Sana transformer: .*{words}", "a.safetensors", "out")


def test_an_adapter_beside_its_base_is_named(here, original):
    save_file(original | {"blocks.0.attn.proj.lora_A.weight": torch.ones(2, 2)}, "a.safetensors")
    refuses(here, "a.safetensors is a LoRA: merge it into its base", "a.safetensors", "out")
