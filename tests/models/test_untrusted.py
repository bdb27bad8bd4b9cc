"""A model folder that somebody else made: nothing in it is executed, and no config builds what it should not."""

import ast
import inspect
import json
import shutil
from pathlib import Path

import pytest
from diffusers import AutoencoderDC, ModelMixin
from transformers import AutoTokenizer

from sprint.base.errors import SprintError
from sprint.base.names import BUILT_IN
from sprint.models import families
from sprint.models.families import load_family
from sprint.models.sana.family import Sana
from sprint.sample.load import load_generator
from sprint.weights.load import load_teacher
from tests.weights.convert_cases import quiet

ROOT = Path(families.__file__).parents[2]
# classes whose loader knows no code but diffusers' own, and their names where they are opened
NO_REMOTE_CODE = {"AutoencoderDC": AutoencoderDC, "network_class": Sana.network_class}


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(BUILT_IN["tiny"], tmp_path / "model"))


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# ---- nothing is executed ------------------------------------------------------------------------------


def loaders() -> list[tuple[str, str, set[str]]]:
    """Every `from_pretrained(…)` of the package: where, of which class, and its keywords that are False."""
    found = []
    for file in sorted((ROOT / "sprint").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                owner = node.func.value
                name = getattr(owner, "attr", getattr(owner, "id", "?"))
                off = {k.arg for k in node.keywords if getattr(k.value, "value", None) is False}
                found.append((f"{file.relative_to(ROOT)}:{node.lineno}", name, off))
    return found


def test_every_loader_refuses_foreign_code():
    found = loaders()
    assert len(found) >= 8
    for where, name, off in found:
        assert "trust_remote_code" in off or name in NO_REMOTE_CODE, f"{where}: {name}"


def test_the_classes_without_the_switch_have_no_use_for_it():
    for one in NO_REMOTE_CODE.values():
        assert issubclass(one, ModelMixin)
        assert "trust_remote_code" not in inspect.getsource(one.from_pretrained)


def evil(folder: Path, part: str) -> None:
    """Code beside the config of one part, and the names that ask for it."""
    marker = folder.parent / "executed"
    code = f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\nEvilConfig = EvilTokenizer = Evil\n"
    for place in (folder, folder / part):
        (place / "evil.py").write_text(code)
    if part == "tokenizer":
        own = {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}}
        change(folder / "tokenizer/tokenizer_config.json", tokenizer_class="EvilTokenizer", **own)
    elif part == "text_encoder":
        own = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil"}
        change(folder / "text_encoder/config.json", model_type="evil", auto_map=own)
    else:
        own = {"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
        change(folder / part / "config.json", auto_map=own)


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae", "transformer"])
def test_code_in_a_folder_is_neither_run_nor_asked_about(folder, part, monkeypatch):
    def asked(*_):
        raise AssertionError("a question on standard input")

    monkeypatch.setattr("builtins.input", asked)
    evil(folder, part)
    change(folder / "model_index.json", _class_name=["evil", "Evil"], text_encoder=["evil", "Evil"])
    try:
        load_generator(str(folder))  # a part of a known kind opens all the same
    except SprintError as error:
        assert "\n" not in str(error)
    assert not (folder.parent / "executed").exists()


# ---- configs ------------------------------------------------------------------------------------------

DIGITS = "9" * 4000
NETWORK = {
    "attention_head_dim": ["0", '"x"', "true", "3.5", "99999"],
    "dropout": ["3", "1", "NaN", '"x"'],
    "norm_eps": ['"x"', "-1", "1e400", DIGITS],
    "timestep_scale": ['"x"', "0", "null", "[]"],
    "sample_size": ["0", "4096", DIGITS, "1.5"],
    "interpolation_scale": ["0", "-1", '"x"', "1e9"],
    "num_cross_attention_heads": [f'"{DIGITS}"', DIGITS, "-4", "0"],
    "num_layers": ["-1", "100000", "{}"],
    "patch_size": ["0", '"1"'],
    "mlp_ratio": ["0", "1e6", "Infinity"],
    "qk_norm": ["[]", '"layer_norm"', "7"],
    "guidance_embeds_scale": ["NaN", '"x"'],
    "out_channels": ["0", "-8"],
    "attention_bias": ["1", '"no"'],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in NETWORK.items() for v in values])
def test_a_network_config_out_of_range(folder, field, value):
    file = folder / "transformer/config.json"
    content = json.loads(file.read_text()) | {field: "HERE"}
    file.write_text(json.dumps(content).replace('"HERE"', value))
    with pytest.raises(SprintError, match=f"config.json.*{field}") as error:
        load_teacher(str(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_positions_of_absurd_size(folder):
    change(
        folder / "transformer/config.json", interpolation_scale=1.0, sample_size=512, num_attention_heads=70
    )
    with pytest.raises(SprintError, match="512×512 positions, 2240 wide: no such network fits"):
        load_teacher(str(folder))


@pytest.mark.parametrize("value", [[], {}, 3, True])
def test_class_names_that_are_no_text(folder, value):
    change(folder / "model_index.json", _class_name=value)
    quiet(str(folder), folder.parent / "out")
    change(folder / "transformer/config.json", _class_name=value)
    with pytest.raises(SprintError, match=r"config\.json"):
        load_teacher(str(folder))


PARTS = [
    ("text_encoder/config.json", "hidden_size", 10**9),
    ("text_encoder/config.json", "num_hidden_layers", 10**6),
    ("text_encoder/config.json", "num_hidden_layers", "x"),
    ("text_encoder/config.json", "model_type", []),
    ("text_encoder/config.json", "vocab_size", 500),  # weights that the file lacks, or of another shape
    ("vae/config.json", "encoder_block_out_channels", [2**17] * 4),
    ("vae/config.json", "decoder_layers_per_block", [10**6] * 4),
    ("vae/config.json", "encoder_layers_per_block", [2, 1, 1, 1]),
    ("vae/config.json", "decoder_block_types", "x"),
    ("vae/config.json", "scaling_factor", "x"),
]


@pytest.mark.parametrize(("file", "field", "value"), PARTS)
def test_a_part_that_is_not_what_it_should_be(folder, file, field, value):
    change(folder / file, **{field: value})
    with pytest.raises(SprintError) as error:
        load_family(str(folder), 20, False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("text_encoder/config.json", "hidden_size", 2**16),
        ("vae/config.json", "encoder_block_out_channels", [2**16] * 4),
    ],
)
def test_a_config_of_more_weights_than_its_files_hold(folder, file, field, value):
    change(folder / file, **{field: value})
    with pytest.raises(SprintError, match=r"config.json describes .* weights, its files hold .* bytes"):
        load_family(str(folder), 20, False)


def test_deep_json_and_broken_tokenizers(folder):
    for file, content in (
        ("tokenizer/tokenizer.json", "{"),
        ("text_encoder/config.json", "[" * 100_000),
        ("vae/config.json", "[]"),
        ("vae/diffusion_pytorch_model.safetensors", "x" * 100),
    ):
        before = (folder / file).read_bytes()
        (folder / file).write_text(content)
        with pytest.raises(SprintError) as error:
            load_family(str(folder), 20, False)
        assert "\n" not in str(error.value)
        (folder / file).write_bytes(before)
    load_family(str(folder), 20, False)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """Its token has no row in the encoder: on a CPU an IndexError at the first prompt, on a GPU a lost device."""
    folder = Path(shutil.copytree(BUILT_IN["tiny"], tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(SprintError, match=r"has a token \d+, and the text encoder knows \d+ tokens"):
        load_family(str(folder))


def test_a_tokenizer_that_cannot_be_called_is_refused(tmp_path):
    folder = Path(shutil.copytree(BUILT_IN["tiny"], tmp_path / "model"))
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": {"a": 1}}))
    with pytest.raises(SprintError, match="TypeError"):
        load_family(str(folder))
