"""A miniature teacher, a recipe that distils it in seconds, and the command line without a process."""

import json
import os
from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

from sprint.cli.main import main
from sprint.evaluate.metrics import fid
from tests.cli.cases import RECIPE, Result, tree
from tests.sample.test_generate import mini_family, mini_network


@pytest.fixture
def sprint(capsys):
    """`sprint("sample", "tiny", …)` -> Result"""

    def call(*argv) -> Result:
        capsys.readouterr()
        try:
            main([str(arg) for arg in argv])
            code = 0
        except SystemExit as end:
            code = end.code
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def refusal(sprint):
    """`refusal("sample", …)` -> the one line; the current folder stays as it was."""

    def call(*argv) -> str:
        before = tree()
        code, _, err = sprint(*argv)
        assert code == 2, err
        assert err.startswith("sprint: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert tree() == before
        return err

    return call


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """A base Sana pipeline of a few thousand weights for pictures of 64 pixels."""
    folder = tmp_path_factory.mktemp("mini") / "teacher"
    family, network = mini_family(), mini_network()
    network.register_to_config(sample_size=16)
    parts = family.tokenizer, family.text_encoder, family.autoencoder, network
    SanaPipeline(*parts, FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(folder)
    text = {"max_length": 80, "instruction": False}
    (folder / "sprint.json").write_text(json.dumps({"text": text, "size": 64}))
    return folder


@pytest.fixture(scope="session")
def recipe(teacher) -> Path:
    file = teacher.parent / "mini.yaml"
    file.write_text(RECIPE.format(teacher=teacher))
    return file


@pytest.fixture(scope="session")
def finished(recipe) -> Path:
    """The folder of a run that nothing disturbed."""
    here = Path.cwd()
    os.chdir(recipe.parent)
    try:
        main(["distill", str(recipe)])
    finally:
        os.chdir(here)
    return recipe.parent / "runs" / "mini"


@pytest.fixture
def student(finished) -> Path:
    return finished / "student"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def few_real_scenes(monkeypatch):
    """FID against 40 real scenes, not 3000."""
    monkeypatch.setattr(fid, "REFERENCE_SCENES", 40)
