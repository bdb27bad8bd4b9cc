"""What the certificate compares: the output alone, opened anew, its settings and its outputs."""

import importlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sprint.models.sana.ranges import SanaConfig
from sprint.weights import verify
from sprint.weights.checkpoint import understand
from sprint.weights.convert import describe
from sprint.weights.load import build_network, load_teacher
from tests.weights.convert_cases import network, output, quiet, refuses, to_original

module = importlib.import_module("sprint.weights.convert")
pytest_plugins = "tests.weights.convert_fixtures"

POSITIONS = {"interpolation_scale": 1.0, "sample_size": 64}
# every setting that shapes do not tell, away from what a reader would assume
SETTINGS = POSITIONS | {
    **{"norm_eps": 1e-3, "dropout": 0.25, "guidance_embeds_scale": 0.3, "timestep_scale": 0.5},
    **{"num_cross_attention_heads": 8, "cross_attention_head_dim": 16},
    **{"num_attention_heads": 8, "attention_head_dim": 16},
}


# ---- settings -----------------------------------------------------------------------------------------


def test_every_setting_travels_in_the_file_alone(here):
    net = network(**SETTINGS)
    net.save_pretrained("net")
    quiet("net", "net.safetensors", to="original")
    (here / "alone").mkdir()
    (here / "net.safetensors").rename(here / "alone/it.safetensors")
    found = understand("alone/it.safetensors")
    told = {key: value for key, value in net.config.items() if not key.startswith("_")}
    assert found.config == told
    assert torch.equal(output(build_network(found)), output(net))
    quiet("alone/it.safetensors", "back", verify="full")
    assert torch.equal(output(load_teacher("back")[0]), output(net))


def test_the_schema_knows_every_argument_of_the_class():
    assert SanaConfig.__annotations__.keys() == {key for key in network().config if not key.startswith("_")}


@pytest.mark.parametrize(
    "setting", ["sample_size", "norm_eps", "num_attention_heads", "timestep_scale", "dropout"]
)
def test_a_pickle_that_would_lose_a_setting_is_refused(here, setting):
    names = [setting] if setting != "num_attention_heads" else [setting, "attention_head_dim"]
    network(**{name: SETTINGS[name] for name in names}).save_pretrained("net")
    for level in ("fast", "off"):
        refuses(
            here,
            f"x.pth has no place for .*{setting}.*name the output .safetensors",
            "net",
            "x.pth",
            to="original",
            verify=level,
        )


def test_a_pickle_that_would_not_open_alone_is_refused(here):
    network(qk_norm="rms_norm_across_heads").save_pretrained("sana15")
    refuses(
        here,
        r"x.pth alone would not open: .*--time-scale.*name the output .safetensors",
        "sana15",
        "x.pth",
        to="original",
        time_scale=1000,
    )


def test_a_setting_that_is_lost_on_the_way_is_found(here, monkeypatch):
    """As if the writer forgot it: the settings are told by the file, not remembered."""
    network(**POSITIONS).save_pretrained("net")
    real = module.write_safetensors

    def forgets(path, specs, tensors, metadata):
        real(path, specs, tensors, {key: value for key, value in metadata.items() if key != "config"})

    monkeypatch.setattr(module, "write_safetensors", forgets)
    refuses(here, "has no place for sample_size 64", "net", "x.safetensors", to="original")


def test_the_outputs_of_two_networks_are_compared(here, file, monkeypatch):
    """Not those of one with itself: a source that is built otherwise fails."""
    real = verify.build_network

    def other_source(checkpoint, *args, **kwargs):
        net = real(checkpoint, *args, **kwargs)
        if checkpoint.layout == "original":
            net.proj_out.bias = torch.nn.Parameter(net.proj_out.bias + 0.01)
        return net

    monkeypatch.setattr(verify, "build_network", other_source)
    refuses(here, "certificate failed: velocities differ by", file, "out")


def test_config_and_metadata_that_contradict_each_other(here):
    network(**POSITIONS).save_pretrained("net")
    quiet("net", "out")
    config = json.loads((here / "out/config.json").read_text())
    (here / "out/config.json").write_text(json.dumps(config | {"interpolation_scale": 2.0}))
    refuses(here, "interpolation_scale is 2.0 in config.json and 1.0 in the file's metadata", "out", "again")


# ---- positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "size", "dtype"),
    [(1.0, 64, torch.float32), (2.0, 128, torch.bfloat16), (1.5, 64, torch.float16)],
)
def test_positions_are_read_off_the_table(here, scale, size, dtype):
    net = network(interpolation_scale=scale, sample_size=size, num_layers=1)
    state = to_original(net)
    save_file(state | {"pos_embed": net.patch_embed.pos_embed.to(dtype)}, "big.safetensors")
    result = quiet("big.safetensors", "out")
    assert "left out, since the network computes the same values: pos_embed" in describe(result)
    assert result["certificate"]["bits"]["tensors"] == len(state)
    teacher, _ = load_teacher("out")
    assert (teacher.config.interpolation_scale, teacher.config.sample_size) == (scale, size)
    assert torch.equal(output(teacher), output(net))


def test_an_empty_table_tells_the_size(here):
    net = network(**POSITIONS)
    save_file(to_original(net) | {"pos_embed": torch.zeros(1, 64 * 64, 128)}, "big.safetensors")
    quiet("big.safetensors", "out")
    assert torch.equal(output(load_teacher("out")[0]), output(net))


def test_a_table_that_is_another_is_refused(here):
    net = network(**POSITIONS)
    net.save_pretrained("net")
    table = net.patch_embed.pos_embed + 0.01
    save_file(to_original(net) | {"pos_embed": table}, "big.safetensors")
    refuses(here, r"pos_embed is not the table .* 1.0e-02 off at best", "big.safetensors", "out")
    save_file({"pos_embed": table}, "net/extra.safetensors")
    refuses(here, r"pos_embed is not the table", "net", "out")


def test_sample_size_option(here):
    net = network(**POSITIONS)
    save_file(to_original(net), "big.safetensors")
    quiet("big.safetensors", "out", sample_size=64)
    assert torch.equal(output(load_teacher("out")[0]), output(net))
    save_file(to_original(net) | {"pos_embed": net.patch_embed.pos_embed}, "told.safetensors")
    refuses(here, "pos_embed is of 64 latent cells a side", "told.safetensors", "no", sample_size=32)
    refuses(
        here,
        "--sample-size 32 means sample_size 32, but the file's metadata says 64",
        "out",
        "no",
        sample_size=32,
    )
    refuses(
        here,
        "--sample-size 0: sample_size: .*greater than or equal to 1",
        "big.safetensors",
        "no",
        sample_size=0,
    )


# ---- finite -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["trigflow", "original"])
@pytest.mark.parametrize("level", ["fast", "off"])
def test_weights_that_are_not_finite_are_named(here, original, to, level):
    state = {key: tensor.clone() for key, tensor in original.items()}
    state["blocks.1.attn.qkv.weight"][5, 7] = float("nan")
    state["final_layer.linear.bias"][:2] = float("inf")
    save_file(state, "bad.safetensors")
    words = "bad.safetensors: 2 of 61 weights are not finite.*"
    words += "final_layer.linear.bias .2 of 8 values.*blocks.1.attn.qkv.weight .1 of 49,152"
    refuses(here, words, "bad.safetensors", "out", to=to, verify=level)


def test_an_extra_that_is_not_finite_is_named(here, original):
    save_file(original | {"pos_embed": torch.full((1, 64, 128), torch.nan)}, "bad.safetensors")
    refuses(here, "bad.safetensors: 1 of 2 weights are not finite.*pos_embed", "bad.safetensors", "out")


def test_outputs_that_are_not_finite_are_no_agreement(here, original):
    huge = original["x_embedder.proj.weight"] * 1e38
    save_file(original | {"x_embedder.proj.weight": huge.clamp(-3e38, 3e38)}, "huge.safetensors")
    refuses(here, "certificate failed: of .* velocities .* nothing to compare", "huge.safetensors", "out")


def test_metadata_says_all_settings_once(here, file):
    quiet(file, "x.safetensors", to="original")
    with safe_open("x.safetensors", "pt") as opened:
        told = opened.metadata()
    assert told.keys() == {"format", "time_scale", "num_cross_attention_heads", "config"}
    assert json.loads(told["config"]).keys() == SanaConfig.__annotations__.keys()
