"""`sprint recipes`, in an empty folder and beside recipes of one's own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.cases import ROOT

pytest_plugins = "tests.cli.fixtures"

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))


def test_listed_anywhere(sprint, here):
    code, out, err = sprint("recipes")
    assert (code, err) == (0, "")
    lines = out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == sorted(file.stem for file in SHIPPED)
    assert next(line for line in lines if line.startswith("tiny ")).split()[1:3] == ["64", "px"]
    assert all(str(here) not in line for line in lines)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_printed_to_edit(sprint, here, file):
    assert sprint("recipes", file.stem) == (0, file.read_text(), "")


def test_own_recipes_are_listed_and_win(sprint, here):
    Path("recipes").mkdir()
    Path("recipes/tiny.yaml").write_text("needs: luck\ndata: {size: 9}\n")
    Path("recipes/broken.yaml").write_text("# half a recipe.\n[")
    Path("recipes/odd.yaml").write_text("data: {size: [8]}")
    Path("recipes/folder.yaml").mkdir()
    out = sprint("recipes").out
    assert "tiny             9 px  luck (recipes/tiny.yaml)\n" in out
    assert " [8] px " in out and "folder" not in out
    assert "cannot be read: recipes/broken.yaml, line 2: not valid YAML" in out
    assert sprint("recipes", "tiny").out == "needs: luck\ndata: {size: 9}\n"


def test_what_is_not_there(refusal, here):
    assert "huge: no such recipe (looked for huge and recipes/huge.yaml; there are " in refusal(
        "recipes", "huge"
    )


def test_what_cannot_be_read(refusal, here):
    Path("mine.yaml").write_bytes(b"name: \xff")
    assert "mine.yaml is not UTF-8 text" in refusal("recipes", "mine.yaml")


def test_listing_is_quick(here):
    """No torch: a person who asks which recipes there are waits for nothing."""
    program = (
        "import sys; from sprint.cli.main import main; main(['recipes']); "
        "print(*{'torch', 'diffusers', 'numpy', 'omegaconf'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == ""
