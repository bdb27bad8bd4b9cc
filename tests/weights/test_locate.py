"""Which files of a folder hold the network: diffusers' names, variants, trainers' folders, runs."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sprint.weights.sources import open_source
from tests.weights.convert_cases import quiet, refuses, same_bits

pytest_plugins = "tests.weights.convert_fixtures"

HALF = {"variant": "bf16"}
# what save_pretrained is asked for, what it writes then, and the variant that is found
LAYOUTS = {
    "one": ({}, ""),
    "bin": ({"safe_serialization": False}, ""),
    "shards": ({"max_shard_size": "200KB"}, ""),
    "bin shards": ({"max_shard_size": "200KB", "safe_serialization": False}, ""),
    "variant": (HALF, "bf16"),
    "variant shards": (HALF | {"max_shard_size": "200KB"}, "bf16"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_diffusers_writes_is_found(here, net, layout):
    options, variant = LAYOUTS[layout]
    net.save_pretrained("model/transformer", **options)
    names = {file.name for file in (here / "model/transformer").iterdir()}
    assert any("index" in name for name in names) == ("shards" in layout)
    for choice in {None, variant or None}:
        result = quiet("model", f"out-{choice}", variant=choice)
        assert result["source"]["variant"] == variant
        assert same_bits(
            load_file(f"out-{choice}/diffusion_pytorch_model.safetensors"), dict(net.state_dict())
        )


def test_variants_are_chosen_as_diffusers_does(here, net):
    net.save_pretrained("model")
    net.half().save_pretrained("model", variant="fp16")
    assert quiet("model", "whole")["source"]["dtypes"] == ["float32"]
    assert quiet("model", "half", variant="fp16")["source"]["dtypes"] == ["float16"]
    refuses(
        here, "model has no weights of variant bf16; variants there: fp16", "model", "out", variant="bf16"
    )
    net.save_pretrained("model", variant="ema", max_shard_size="200KB")
    os.remove("model/diffusion_pytorch_model.safetensors")
    refuses(here, "model holds variants ema, fp16; choose one with --variant NAME", "model", "out")
    net.float()


def test_variants_are_of_folders(here, file):
    refuses(
        here,
        "--variant chooses among the files of a folder; teacher.safetensors is a file",
        file,
        "o",
        variant="x",
    )


def test_shards_by_an_index_of_either_name(here, original):
    """diffusers has written a variant's index under both names."""
    save_file(original, "diffusion_pytorch_model-00001-of-00001.bf16.safetensors")
    index = {"weight_map": dict.fromkeys(original, "diffusion_pytorch_model-00001-of-00001.bf16.safetensors")}
    for name in ("safetensors.index.bf16.json", "bf16.safetensors.index.json"):
        path = here / f"diffusion_pytorch_model.{name}"
        path.write_text(json.dumps(index))
        assert open_source(".").variant == "bf16"
        assert set(open_source(path).entries) == set(original)
        path.unlink()
    assert set(open_source(".").entries) == set(original)  # all shards, and no index


def test_shards_that_are_not_all_there(here, original):
    save_file(original, "model-00001-of-00002.safetensors")
    refuses(here, "holds 1 of the 2 shards of model-00001-of-00002.safetensors", ".", "out")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../secret.safetensors"}, "names the shard ../secret.safetensors; shards must lie beside"),
        ({"a": "/etc/passwd"}, "names the shard /etc/passwd; shards must lie beside"),
        ({"a": ["x"]}, "weight_map: a: Input should be a valid string"),
        ([], "weight_map: Input should be a valid dictionary"),
        ({}, "has no weight_map"),
        ({"a": "model.safetensors.index.json"}, "is an index of shards, not a shard"),
    ],
)
def test_an_index_names_files_beside_it(here, original, weight_map, words):
    save_file(original, "secret.safetensors")
    (here / "model").mkdir()
    (here / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for source in ("model", "model/model.safetensors.index.json"):
        refuses(here, words, source, "out")


def test_a_run_is_its_student(here, net):
    net.save_pretrained("runs/tiny/student/transformer")
    (here / "runs/tiny/student/model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    (here / "runs/tiny/recipe.yaml").write_text("")
    result = quiet("runs/tiny", "out")
    assert result["source"]["files"][0]["name"] == "diffusion_pytorch_model.safetensors"
    assert result["time_scale_from"] == "model_index.json"


def test_what_a_trainer_keeps_beside_weights_is_no_choice(here, original):
    (here / "state").mkdir()
    save_file(original, "state/model.safetensors")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "training_args.bin"):
        torch.save({"a": torch.ones(1)}, f"state/{name}")
    assert set(open_source("state").entries) == set(original)


def test_an_average_beside_the_transformer_is_said(here, net):
    net.save_pretrained("checkpoint-500/transformer")
    shutil.copytree("checkpoint-500/transformer", "checkpoint-500/transformer_ema")
    assert quiet("checkpoint-500", "out")["source"]["ignored"] == ["transformer_ema"]
    refuses(here, "no model in folder .*; perhaps one of its folders: checkpoint-500", ".", "out")


def test_checkpoints_in_parts_are_named_with_the_way_to_make_one(here, original):
    (here / "dcp/pytorch_model_fsdp_0").mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp"):
        (here / "dcp/pytorch_model_fsdp_0" / name).write_bytes(b"\x80\x04N.")
    dcp = "kept in parts; make a file of it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
    for source in ("dcp", "dcp/pytorch_model_fsdp_0", "dcp/pytorch_model_fsdp_0/__0_0.distcp"):
        refuses(here, dcp, source, "out")
    (here / "ds/global_step10").mkdir(parents=True)
    (here / "ds/latest").write_text("global_step10")
    file = "ds/global_step10/mp_rank_00_model_states.pt"
    torch.save({"module": original, "optimizer": None}, file)
    for source in ("ds", "ds/global_step10"):
        refuses(
            here, f"kept in parts; make a file of it: python zero_to_fp32.py.* or give {file}", source, "out"
        )
    assert open_source(file).prefix == "module"


def test_pipes_and_devices_in_a_folder_are_not_read(here):
    (here / "model").mkdir()
    os.mkfifo("model/model.safetensors")
    refuses(here, "model.safetensors is a pipe or a device", "model", "out")
    os.unlink("model/model.safetensors")
    os.symlink("/dev/zero", "model/config.json")
    refuses(here, "config.json is a pipe or a device", "model", "out")


def test_configs_that_are_no_configs(here, file):
    for text, words in (
        ("[" * 5000, "config.json is not valid JSON"),
        ("[]", "config.json is not a JSON object"),
        ('{"_class_name": ["SanaTransformer2DModel"]}', "which is not a Sana transformer"),
    ):
        (here / "model").mkdir(exist_ok=True)
        (here / "model/config.json").write_text(text)
        refuses(here, words, "model", "out")


def test_weights_beside_the_network_are_said(here, original):
    """Two networks of one accelerate state, or old ones beside new shards: which are read, and which are not."""
    (here / "state").mkdir()
    for name in ("model.safetensors", "model_1.safetensors"):
        save_file(original, f"state/{name}")
    result = quiet("state", "out")
    assert [file["name"] for file in result["source"]["files"]] == ["model.safetensors"]
    assert result["source"]["ignored"] == ["model_1.safetensors"]


def test_parts_of_zero_3_are_named_for_what_they_are(here, original):
    file = here / "ds/zero_pp_rank_0_mp_rank_00_model_states.pt"
    file.parent.mkdir()
    torch.save({"module": {name: torch.empty(0) for name in original}}, file)
    for source in ("ds", str(file)):
        refuses(here, "a checkpoint of DeepSpeed, kept in parts", source, "out")
    file.rename(here / "gathered.pt")
    refuses(here, r"its shape is \[0\]; ZeRO 3 and FSDP leave such behind", "gathered.pt", "out")


def test_the_cache_of_the_hub_says_where_its_snapshot_is(here, net):
    net.save_pretrained("models--a--b/snapshots/0123/transformer")
    refuses(here, "the hub's cache: give models--a--b/snapshots/0123", "models--a--b", "out")
    assert quiet("models--a--b/snapshots/0123", "out")
