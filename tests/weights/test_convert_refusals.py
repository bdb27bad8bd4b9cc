"""Wrong input to the converter: one line that names the culprit, and nothing left behind."""

import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from sprint.weights.convert import default_out
from tests.weights.convert_cases import DEPTH, left_behind, quiet, refuses

pytest_plugins = "tests.weights.convert_fixtures"


# ---- wrong input ------------------------------------------------------------------------------------


def test_config_json_that_disagrees(here, net):
    net.save_pretrained("folder")
    config = json.loads((here / "folder/config.json").read_text())
    (here / "folder/config.json").write_text(json.dumps(config | {"num_layers": 9}))
    refuses(here, f"config.json says num_layers 9, the weights {DEPTH}", "folder", "out")
    (here / "folder/config.json").write_text(json.dumps(config | {"_class_name": "FluxTransformer2DModel"}))
    refuses(here, "FluxTransformer2DModel, which is not a Sana transformer", "folder", "out")
    (here / "folder/config.json").write_text("{broken")
    refuses(here, "config.json is not valid JSON", "folder", "out")


def change(state: dict, key: str, tensor: torch.Tensor | None) -> dict:
    return {k: t for k, t in (state | {key: tensor}).items() if t is not None}


BAD_STATES = {
    "missing key blocks.1.mlp.point_conv.conv.weight": ("blocks.1.mlp.point_conv.conv.weight", None),
    "missing key x_embedder.proj.weight": ("x_embedder.proj.weight", None),
    "missing key y_embedder.y_proj.fc1.weight": ("y_embedder.y_proj.fc1.weight", None),
    "unknown key blocks.1.attn.lora": ("blocks.1.attn.lora", torch.ones(2)),
    "missing key blocks.3.scale_shift_table": ("blocks.5.attn.proj.bias", torch.ones(128)),
    "unknown key blocks.999999999.attn.proj.bias": ("blocks.999999999.attn.proj.bias", torch.ones(128)),
    r"blocks.2.attn.qkv.weight has shape \[383, 128\], expected \[384, 128\]": (
        "blocks.2.attn.qkv.weight",
        torch.ones(383, 128),
    ),
    r"x_embedder.proj.weight has shape \[127, 8, 1, 1\], expected \[128, 8, 1, 1\]": (
        "x_embedder.proj.weight",
        torch.ones(127, 8, 1, 1),
    ),
    r"final_layer.linear.weight has shape \[9, 128\], expected \[8, 128\]": (
        "final_layer.linear.weight",
        torch.ones(9, 128),
    ),
    r"pos_embed has shape \[1, 64, 127\], expected \[1, any, 128\]": ("pos_embed", torch.ones(1, 64, 127)),
    r"t_block.1.bias has shape \[\]": ("t_block.1.bias", torch.ones(())),
    "blocks.0.attn.proj.bias is torch.int64": ("blocks.0.attn.proj.bias", torch.ones(128, dtype=torch.int64)),
    "pos_embed is not the table that Sana computes": ("pos_embed", torch.ones(1, 4096, 128)),
    "pos_embed has 65 places, which are no square": ("pos_embed", torch.ones(1, 65, 128)),
}


@pytest.mark.parametrize("message", BAD_STATES)
def test_bad_keys_are_named(here, original, message):
    torch.save({"state_dict": change(original, *BAD_STATES[message])}, "teacher.pth")
    refuses(here, message, "teacher.pth", "out")


def test_bad_keys_of_diffusers_are_named(here, net):
    state = dict(net.state_dict())
    for name, bad in {
        "missing key time_embed.linear.bias": change(state, "time_embed.linear.bias", None),
        "unknown key transformer_blocks.0.attn1.to_q.gate": change(
            state, "transformer_blocks.0.attn1.to_q.gate", torch.ones(4)
        ),
        "to_q.weight and transformer_blocks.0.attn1.to_k.weight .* different dtypes": change(
            state,
            "transformer_blocks.0.attn1.to_q.weight",
            state["transformer_blocks.0.attn1.to_q.weight"].half(),
        ),
    }.items():
        torch.save(bad, "teacher.pth")
        refuses(here, name, "teacher.pth", "out")


class Bomb:
    """Unpickled with code execution, it leaves a file."""

    def __reduce__(self):
        return os.mkdir, ("boom",)


def test_pickles_that_run_code_are_refused(here, original):
    torch.save({"state_dict": original, "extra": Bomb()}, "zip.pth")
    torch.save({"state_dict": original, "extra": Bomb()}, "old.pth", _use_new_zipfile_serialization=False)
    for name in ("zip.pth", "old.pth"):
        refuses(here, f"{name} refused: opening it would run code .*mkdir", name, "out")
    assert not (here / "boom").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(here, file, original, share):
    torch.save({"state_dict": original}, "teacher.pth")
    for name in (file, "teacher.pth"):
        content = (here / name).read_bytes()
        (here / name).write_bytes(content[: int(share * len(content))])
        refuses(here, f"{name} is truncated or not a", name, "out")


def test_things_that_are_no_model(here):
    save_file({"model.layers.0.weight": torch.ones(2)}, "llama.safetensors")
    torch.save([torch.ones(2)], "list.pth")
    torch.save({"weight": torch.ones(2), "step": 3}, "step.pth")
    save_file({}, "empty.safetensors")
    (here / "notes.txt").write_text("hello")
    (here / "folder").mkdir()
    (here / "folder/readme.txt").write_text("hello")
    (here / "many").mkdir()
    save_file({"a": torch.ones(1)}, "many/a.safetensors")
    save_file({"b": torch.ones(1)}, "many/b.safetensors")
    refuses(
        here, "llama.safetensors is not a Sana transformer.*model.layers.0.weight", "llama.safetensors", "out"
    )
    refuses(here, "list.pth holds a list, not a dict of tensors", "list.pth", "out")
    refuses(here, "step.pth is not a Sana transformer: its keys are like weight", "step.pth", "out")
    refuses(here, "empty.safetensors holds no tensor", "empty.safetensors", "out")
    refuses(here, "notes.txt is truncated or not a checkpoint: it is text", "notes.txt", "out")
    refuses(here, "no model in folder folder", "folder", "out")
    refuses(here, "many holds 2 checkpoints; give one of them: a.safetensors", "many", "out")
    refuses(here, "no file or folder missing.safetensors", "missing.safetensors", "out")
    refuses(here, "no file or folder folder/transformer", "folder/transformer", "out")
    save_file({"a": torch.ones(1)}, "one.safetensors")
    refuses(here, "the name of the model is empty", "", "out")  # not: whatever lies here
    refuses(here, "~nobody-of-that-name/x: there is no such user", "~nobody-of-that-name/x", "out")
    refuses(here, "no file or folder xxx", "x" * 5000, "out")


def test_bad_options(here, file):
    refuses(here, "--to trig: choose one of trigflow, flow, original", file, "out", to="trig")
    refuses(here, "--verify maybe: choose one of", file, "out", verify="maybe")
    refuses(here, "--dtype int8: choose one of fp32, fp16, bf16", file, "out", dtype="int8")


def test_float16_overflow_is_named(here, original):
    save_file(original | {"t_block.1.bias": original["t_block.1.bias"] * 1e7}, "big.safetensors")
    refuses(
        here, "time_embed.linear.bias holds values beyond float16", "big.safetensors", "out", dtype="fp16"
    )


def test_hub_out_of_reach(here, monkeypatch):
    def offline(repo_id, allow_patterns):
        raise LocalEntryNotFoundError("cannot reach the hub\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refuses(
        here,
        "no file or folder someone/sana; from the hub: .* hf download someone/sana",
        "someone/sana",
        "out",
    )


def test_hub_gives_a_folder_and_only_the_network_is_asked_for(here, net, monkeypatch):
    net.save_pretrained("cache/transformer")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda _, allow_patterns: asked.extend(allow_patterns) or "cache"
    )
    assert quiet("someone/sana")["out"] == "sana-trigflow"
    assert "transformer/*" in asked
    assert not any("text_encoder" in pattern or pattern.startswith("*.") for pattern in asked)


# ---- whole or nothing -------------------------------------------------------------------------------


def test_output_in_use(here, file):
    (here / "out").mkdir()
    quiet(file, "out")  # an empty folder is free
    refuses(here, "output folder out is not empty", file, "out")
    refuses(here, "output file teacher.safetensors exists already", file, file, to="original")


def test_full_disk_leaves_nothing(here, file, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sprint.weights.convert.write_safetensors", full)
    refuses(
        here, "cannot write new/deep/out: No space left on device; nothing was left", file, "new/deep/out"
    )


@pytest.fixture
def small_files():
    """The system itself refuses to let a file grow beyond 200 kB, halfway through the weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_real_write_failure_leaves_nothing(here, file, small_files):
    refuses(here, "cannot write out: File too large", file, "out")
    refuses(here, "cannot write out.safetensors: File too large", file, "out.safetensors", to="original")
    refuses(here, "cannot write out.pth: torch.save failed", file, "out.pth", to="original")


def test_interrupt_leaves_nothing(here, file, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sprint.weights.convert._certify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quiet(file, "out")
    assert left_behind(here) == {file}


@pytest.mark.parametrize(
    ("out", "to", "words"),
    [
        ("", "trigflow", "-o is empty"),
        ("~nobody-of-that-name/x", "trigflow", "there is no such user"),
        ("a\0b", "trigflow", "cannot hold a NUL"),
        ("x.safetensors", "trigflow", "writes a folder, .* not named .safetensors; --to original writes one"),
        ("x.txt", "original", "a file that ends with .safetensors or .pth, which is not named .txt"),
        ("x.bin", "original", "which is not named .bin"),
    ],
)
def test_an_output_is_what_its_name_says(here, file, out, to, words):
    refuses(here, words, file, out, to=to)


def test_the_suffix_of_an_output_may_be_in_capitals(here, file):
    quiet(file, "NET.PTH", to="original")
    assert Path("NET.PTH").is_file()


def test_a_folder_without_a_name_of_its_own_has_one(here, original):
    for name in (".", "..", "sub/../"):
        assert default_out(name, "flow").name == f"{Path(os.path.abspath(name)).name}-flow"


@pytest.mark.parametrize(("dtype", "value"), [("bf16", 3.4e38), ("fp16", 1e6)])
def test_rounding_that_overflows_says_what_to_do(here, original, dtype, value):
    name = next(iter(original))
    original[name] = original[name].float()
    original[name].view(-1)[0] = value
    save_file({key: tensor.float() for key, tensor in original.items()}, "wide.safetensors")
    refuses(here, "weight holds values beyond .*--dtype", "wide.safetensors", "out", dtype=dtype)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"shadow_params": [torch.ones(2)]}, "shadow_params is a list of tensors without their names"),
        ({"state_dict": {"a.weight": np.ones(3)}}, "holds NumPy arrays, no tensors"),
    ],
)
def test_weights_without_names_or_tensors(here, content, words):
    torch.save(content, "model.pth")
    refuses(here, words, "model.pth", "out")
