"""The page on one's own pictures and teacher: its commands, one after the other, cut to a few updates."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from sprint.evaluate.metrics import latency
from sprint.pages.png import read_png
from tests.test_pages import ROOT, blocks

PAGE = ROOT / "recipes" / "own.md"
pytest_plugins = "tests.cli.fixtures"
STEPS = re.compile(r"\b((?:adapt|distill)\.steps)=\d+")
CUT = "adapt.batch_size=4\ndistill.batch_size=4\nevaluate.prompts=2\nevaluate.steps=[1, 4]\nevaluate.teacher_steps=2"


def edited(recipe: str, lines: str) -> str:
    """A recipe with these lines in place of those of the same keys, or above all others."""
    for line in reversed(lines.splitlines()):
        key = line.partition(":")[0]
        there = re.compile(rf"^{key}:.*$", re.MULTILINE)
        recipe = there.sub(line, recipe) if there.search(recipe) else f"{line}\n{recipe}"
    return recipe


@pytest.mark.slow
def test_the_six_commands_do_what_the_page_says(sprint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "ROUNDS", 2)
    said = []
    for command in "".join(blocks(PAGE, "bash")).splitlines():
        program, *words = shlex.split(command)
        if program == "python":
            monkeypatch.setattr("sys.argv", [words[1], *words[2:]])
            monkeypatch.delitem(sys.modules, words[1], raising=False)  # imported by another test
            runpy.run_module(words[1], run_name="__main__")
            continue
        if words[0] in ("distill", "cache"):
            words = [STEPS.sub(r"\1=2", word) for word in words] + CUT.splitlines()
        into = words[words.index(">") + 1] if ">" in words else None
        code, out, err = sprint(*(words[: words.index(">")] if into else words))
        assert code == 0, f"{command}: {err}"
        said.append(out)
        if into:
            Path(into).write_text(edited(out, blocks(PAGE, "yaml")[0]))
    assert len(said) == 8  # a stand-in, six steps, the last with two commands
    for name in ("report.html", "student/model_index.json", "prompts.txt", "evaluation/index.html"):
        assert (tmp_path / "runs/mine" / name).stat().st_size > 0
    captions = {file.read_text().strip() for file in Path("pictures").glob("*.txt")}
    drawn = Path("runs/mine/prompts.txt").read_text().splitlines()
    assert len(captions) > 40 and len(drawn) == 2 and captions.issuperset(drawn)
    report = Path("runs/mine/report.html").read_text()
    assert all(caption in report for caption in drawn) and "nothing was scored" in report
    assert "drawing, ms a picture" in said[-2] and "scene score" not in said[-2]
    assert read_png(Path(said[-1].strip())).shape == (64, 64, 3)


def test_what_the_page_says_of_sana_is_a_recipe(sprint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(edited(sprint("recipes", "0.6b").out, blocks(PAGE, "yaml")[1]))
    from sprint.recipe.load import load_recipe

    recipe = load_recipe("mine.yaml")
    assert (recipe.name, recipe.engine.value, recipe.data.kind.value) == ("mine", "single", "folder")
    assert 0 < recipe.evaluate.prompts <= 50
