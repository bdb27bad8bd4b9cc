"""Conversion: parity with diffusers both ways, every source, and a certificate that can fail."""

import hashlib
import importlib
import json
import os
import struct
from dataclasses import replace

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file

from sprint.base.errors import SprintError
from sprint.models.view import TrigFlowView
from sprint.weights import sources, verify
from sprint.weights.convert import default_out, describe
from sprint.weights.keys import Rule
from sprint.weights.load import load_teacher
from sprint.weights.sources import open_source
from sprint.weights.verify import TOLERANCE
from tests.tolerance import assert_close, of_network, rounding
from tests.weights.convert_cases import (
    DEPTH,
    network,
    output,
    quiet,
    refuses,
    same_bits,
    to_original,
)
from tools.bench.random_checkpoint import write_random_checkpoint

module = importlib.import_module("sprint.weights.convert")
pytest_plugins = "tests.weights.convert_fixtures"


# ---- there and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
        {"num_layers": 1, "mlp_ratio": 3.0, "patch_size": 2},
        {"num_layers": 5, "attention_bias": True},
    ],
    ids=["base", "student", "pruned", "grown"],
)
def test_original_to_diffusers_is_the_same_network(here, changes):
    theirs = network(**changes)
    state = to_original(theirs)
    if "attention_bias" in changes:
        for i in range(theirs.config.num_layers):
            parts = [state.pop(f"blocks.{i}.attn1.to_{x}.bias") for x in "qkv"]
            state[f"blocks.{i}.attn.qkv.bias"] = torch.cat(parts)
    save_file(state, "teacher.safetensors")
    result = quiet("teacher.safetensors", "out", verify="full")
    ours = SanaTransformer2DModel.from_pretrained("out").eval()
    assert same_bits(ours.state_dict(), theirs.state_dict())
    assert_close(output(ours), output(theirs), of_network(theirs))
    assert result["certificate"]["velocity"]["fp32_error"] <= TOLERANCE[torch.float32]
    assert result["certificate"]["velocity"]["fp64_error"] <= TOLERANCE[torch.float64]
    assert result["certificate"]["ways_back"] == {"flow": len(state), "original": len(state)}
    quiet("out", "back.safetensors", to="original")
    assert same_bits(load_file("back.safetensors"), state)


def test_original_with_its_buffers_comes_back(here, file, original):
    result = quiet(file, "out")
    assert result["tensors"]["extra"] == ["y_embedder.y_embedding", "pos_embed"]
    quiet("out", "flow", to="flow")
    assert not (here / "flow/trigflow.json").exists()
    for source in ("out", "flow"):
        quiet(source, f"{source}.safetensors", to="original")
        quiet(source, f"{source}.pth", to="original")
        assert same_bits(load_file(f"{source}.safetensors"), original)
        assert same_bits(torch.load(f"{source}.pth", weights_only=True)["state_dict"], original)


def test_diffusers_folder_comes_back(here, net):
    net.save_pretrained("pipeline/transformer", max_shard_size="1MB")
    assert len(list((here / "pipeline/transformer").glob("*.safetensors"))) > 1
    result = quiet("pipeline", "out")
    assert len(result["source"]["files"]) > 1
    assert same_bits(load_file("out/diffusion_pytorch_model.safetensors"), net.state_dict())
    quiet("out", "flow", to="flow")
    for back in (SanaTransformer2DModel.from_pretrained("flow").eval(), load_teacher("out")[0]):
        assert_close(output(back), output(net), of_network(net))


def test_student_folder_with_logvar(here):
    student = network(qk_norm="rms_norm_across_heads", guidance_embeds=True)
    student.save_pretrained("student/transformer")
    logvar = {"logvar_linear.weight": torch.randn(1, 128), "logvar_linear.bias": torch.randn(1)}
    save_file(logvar, "student/transformer/logvar.safetensors")
    result = quiet("student", "student.safetensors", to="original")
    assert result["time"] == "dense"
    assert same_bits(load_file("student.safetensors"), to_original(student) | logvar)
    with pytest.raises(
        SprintError, match=r"student is a student \(it embeds guidance\); a teacher is needed"
    ):
        load_teacher("student")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_source_dtypes_are_kept(here, original, dtype):
    state = {key: tensor.to(dtype) for key, tensor in original.items()}
    state["pos_embed"] = original["pos_embed"]
    torch.save({"state_dict": state, "epoch": 3}, "teacher.pth")
    result = quiet("teacher.pth", "out")
    assert result["source"]["prefix"] == "state_dict"
    assert result["source"]["ignored"] == ["epoch"]
    assert {t.dtype for t in load_file("out/diffusion_pytorch_model.safetensors").values()} == {dtype}
    quiet("out", "back.safetensors", to="original")
    assert same_bits(load_file("back.safetensors"), state)


def test_mixed_dtypes_lie_aligned(here, original):
    state = {key: t.bfloat16() if "norm" in key or "bias" in key else t for key, t in original.items()}
    state["attention_y_norm.weight"] = state["attention_y_norm.weight"].double()
    save_file(state, "teacher.safetensors")
    quiet("teacher.safetensors", "out", verify="full")
    quiet("out", "back.safetensors", to="original")
    assert same_bits(load_file("back.safetensors"), state)


def test_dtype_option(here, file, net):
    result = quiet(file, "out", dtype="bf16", verify="full")
    written = load_file("out/diffusion_pytorch_model.safetensors")
    assert same_bits(written, {key: tensor.bfloat16() for key, tensor in net.state_dict().items()})
    assert "after rounding the source to bfloat16" in describe(result)


def test_minus_zero_survives(here, original):
    state = {key: tensor.clone() for key, tensor in original.items()}
    state["final_layer.linear.bias"][1] = -0.0
    save_file(state, "teacher.safetensors")
    quiet("teacher.safetensors", "out")
    quiet("out", "back.safetensors", to="original")
    assert same_bits(load_file("back.safetensors"), state)


def test_bare_and_odd_pickles(here, original, net):
    torch.save(original, "bare.pt")
    odd = {
        key: torch.stack([tensor, tensor], -1)[..., 0] for key, tensor in original.items()
    }  # strided views
    torch.save({"state_dict": odd}, "odd.bin", _use_new_zipfile_serialization=False)
    for name in ("bare.pt", "odd.bin"):
        quiet(name, f"{name}-out")
        assert same_bits(load_file(f"{name}-out/diffusion_pytorch_model.safetensors"), net.state_dict())


def test_sharded_original_and_small_mapped_windows(here, original, net, monkeypatch):
    monkeypatch.setattr(sources, "MAPPED_BYTES", 10_000)  # reopen the shards all the time
    keys = sorted(original)
    shards = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for name, part in shards.items():
        save_file({key: original[key] for key in part}, name)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (here / "model.safetensors.index.json").write_text(json.dumps(index))
    for i, source in enumerate((".", "model.safetensors.index.json")):
        quiet(source, f"out{i}")
        assert same_bits(load_file(f"out{i}/diffusion_pytorch_model.safetensors"), net.state_dict())
    os.remove("model-2.safetensors")
    refuses(here, "names the shard model-2.safetensors, which is missing", ".", "out")


def test_usual_names_and_safetensors_go_first(here, net):
    net.save_pretrained("folder")
    torch.save({"wrong": torch.ones(1)}, "folder/diffusion_pytorch_model.bin")
    save_file({"wrong": torch.ones(1)}, "folder/diffusion_pytorch_model.fp16.safetensors")
    (file,) = quiet("folder", "out")["source"]["files"]
    assert file["name"] == "diffusion_pytorch_model.safetensors"


# ---- what shapes cannot tell ------------------------------------------------------------------------


def test_time_is_recorded_and_respected(here, file):
    assert quiet(file, "sparse")["time_scale"] == 1000
    assert quiet(file, "dense", time_scale=1.0)["time_scale_from"] == "--time-scale"
    for source, scale in (("sparse", 1000), ("dense", 1)):
        assert json.loads((here / source / "trigflow.json").read_text())["time_scale"] == scale
        assert load_teacher(source)[1] == scale
        quiet(source, f"{source}-flow", to="flow")
        assert load_teacher(f"{source}-flow")[1] == scale
    refuses(here, "--time-scale gives time scale 7; it is 1000", file, "out", time_scale=7)


def test_ambiguous_time_is_asked_for(here):
    net = network(qk_norm="rms_norm_across_heads")
    save_file(to_original(net), "adapted.safetensors")
    refuses(here, "sparse or dense time.*--time-scale", "adapted.safetensors", "out")
    assert quiet("adapted.safetensors", "out", time_scale=1.0)["time"] == "dense"
    net.save_pretrained("sana15/transformer")
    (here / "sana15/model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    assert quiet("sana15", "sana15-out")["time_scale_from"] == "model_index.json"


def test_heads_come_from_config_metadata_or_option(here):
    wide = {"num_attention_heads": 3, "num_cross_attention_heads": 6}
    wide |= {"cross_attention_head_dim": 16, "cross_attention_dim": 96}
    net = network(**wide)
    state = to_original(net)
    save_file(state, "plain.safetensors")
    save_file(state, "told.safetensors", {"num_cross_attention_heads": "6", "time_scale": "1000"})
    net.save_pretrained("folder")
    refuses(here, "width 96 is no known size.*--cross-attention-heads", "plain.safetensors", "out")
    refuses(here, "--time-scale", "plain.safetensors", "out", cross_attention_heads=6)
    refuses(here, "6 in config.json", "folder", "out", cross_attention_heads=4, time_scale=1000)
    quiet("plain.safetensors", "a", cross_attention_heads=6, time_scale=1000)
    quiet("told.safetensors", "b")
    quiet("folder", "c", time_scale=1000)
    for folder in "abc":
        back = SanaTransformer2DModel.from_pretrained(folder).eval()
        assert same_bits(back.state_dict(), net.state_dict())
        assert_close(output(back), output(net), of_network(net))


# ---- the certificate --------------------------------------------------------------------------------


def test_wrong_map_fails_the_certificate(here, file, monkeypatch):
    monkeypatch.setattr(Rule, "split", lambda self, t: tuple(reversed(t.chunk(len(self.diffusers)))))
    refuses(here, r"certificate failed: blocks.0.attn.qkv.weight differs", file, "out")


def test_one_flipped_bit_fails_the_certificate(here, file, monkeypatch):
    def flip(checkpoint, folder, specs, stream):
        write(checkpoint, folder, specs, stream)
        path = folder / "diffusion_pytorch_model.safetensors"
        content = bytearray(path.read_bytes())
        content[8 + struct.unpack("<Q", content[:8])[0] + 1000] ^= 1
        path.write_bytes(content)

    write = module._write_diffusers
    monkeypatch.setattr(module, "_write_diffusers", flip)
    refuses(here, "certificate failed: .* differs from the source", file, "out")
    quiet(file, "unverified", verify="off")  # so it is the certificate that saw it


def test_lost_buffer_fails_the_certificate(here, file, monkeypatch):
    def forget(checkpoint, *rest):
        entries = {k: e for k, e in checkpoint.source.entries.items() if k != "pos_embed"}
        write(replace(checkpoint, source=replace(checkpoint.source, entries=entries)), *rest)

    write = module._write_diffusers
    monkeypatch.setattr(module, "_write_diffusers", forget)
    refuses(here, "certificate failed: pos_embed was not kept", file, "out")


@pytest.mark.parametrize("level", ["fast", "full"])
def test_wrong_view_fails_the_certificate(here, file, monkeypatch, level):
    monkeypatch.setattr(verify, "TrigFlowView", lambda net, scale: TrigFlowView(net, scale * 1.001))
    refuses(here, "certificate failed: velocities differ by .* > 1e-05", file, "out", verify=level)


# ---- telling ----------------------------------------------------------------------------------------


def test_record_and_summary(here, file):
    result = quiet(file, "out", verify="full")
    stored = json.loads((here / "out/trigflow.json").read_text())
    assert result == stored | {"out": "out", "size": "Sana of another depth than tiny"}
    digest = hashlib.sha256((here / file).read_bytes()).hexdigest()
    assert stored["source"]["files"] == [
        {"name": file, "bytes": (here / file).stat().st_size, "sha256": digest}
    ]
    assert stored["source"]["layout"] == "original"
    assert stored["sigma_data"] == 0.5
    assert stored["tensors"]["network"] == len(load_file("out/diffusion_pytorch_model.safetensors"))
    text = describe(result)
    assert f"depth {DEPTH}, width 128, {stored['network']['parameters']:,} parameters" in text
    assert "time: sparse, scale 1000 (from the preset of width 128)" in text
    assert "(a)" in text and "fp64" in text and "(c)" in text
    assert "(c) ways back not written out" in describe(quiet(file, "fast"))
    assert "not verified" in describe(quiet(file, "off", verify="off"))


def test_default_names():
    assert str(default_out("a/b/teacher.safetensors", "trigflow")) == "teacher-trigflow"
    assert str(default_out("Sana_0.6B.pth", "flow")) == "Sana_0.6B-flow"
    assert str(default_out("runs/x/transformer", "original")) == "x-original"
    assert str(default_out("owner/Sana_1.6B", "trigflow")) == "Sana_1.6B-trigflow"


def test_load_teacher_gives_fp32_in_eval_mode(here, file, net):
    quiet(file, "half", dtype="fp16")
    teacher, scale = load_teacher("half")
    assert (teacher.dtype, teacher.training, scale) == (torch.float32, False, 1000)
    # every weight rounded once on its way through fp16, and then a walk from layer to layer
    stored = rounding(torch.float16, terms=len(list(net.parameters())))
    assert_close(output(teacher), output(net), stored)
    assert_close(output(load_teacher(file)[0]), output(net), of_network(net))
    os.remove(file)
    assert open_source("half").trigflow["dtypes"] == ["float16", "float32"]


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_random_checkpoints_convert(here, layout):
    write_random_checkpoint("tiny", here / "random.safetensors", layout, torch.float32)
    result = quiet("random.safetensors", "out", verify="full")
    assert result["source"]["layout"] == layout
    assert result["certificate"]["velocity"]["fp64_error"] <= TOLERANCE[torch.float64]
