"""The spread between runs: what is run, what is done already, and what is made of it; nothing is trained here."""

import json

import pytest

from sprint.evaluate.result import Column, Figure, Measured, Result, write_result
from sprint.recipe.load import load_recipe, recipe_hash
from sprint.train.report.spread import family_hash, read_spread
from tools.kernels.__main__ import LEAST
from tools.spread import __main__ as tool

FORCED = -0.1  # what the smaller kernels change in the score


def column(role, steps, score, fid) -> Column:
    measured = {
        "scenes": Measured({"scene score": Figure(score, 0.02)}),
        "fid": Measured({"FID": Figure(fid)}),
    }
    return Column(role, steps, "m", "f" * 64, measured=measured)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Runs that end at once: their score tells seed and kernels. -> what was run, with its environment"""
    monkeypatch.chdir(tmp_path)
    calls = []

    def distill(given, env):
        recipe, *overrides = given
        arguments = dict(pair.split("=", 1) for pair in overrides)
        calls.append((arguments["name"], {key: env.get(key) for key in LEAST}))
        folder = tmp_path / "runs" / arguments["name"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.hash").write_text(recipe_hash(load_recipe(recipe, overrides)) + "\n")
        if arguments["name"].endswith("-2") and (tmp_path / "die").exists():
            return 130
        score = 0.5 + 0.1 * int(arguments["seed"]) + FORCED * (env.get("MKL_CBWR") == "COMPATIBLE")
        columns = [column("student", 2, score, 10 * score), column("teacher", 20, 0.8, 16.0)]
        write_result(folder / "evaluation", Result("tiny", columns, protocols={"scenes": {}, "fid": {}}))
        (folder / "report.html").write_text("")
        return 0

    monkeypatch.setattr(tool, "distill", distill)
    return calls


def test_three_seeds_and_a_second_arithmetic(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    out = tmp_path / "spread.json"
    assert tool.main(["tiny", "--out", str(out), "distill.steps=4"]) == 0
    none, least = dict.fromkeys(LEAST), LEAST
    names = ("spread-tiny-0", "spread-tiny-1", "spread-tiny-2", "spread-tiny-kernels")
    assert trained == list(zip(names, (none, none, none, least), strict=True))
    found = read_spread(out)
    assert found.recipe == family_hash(load_recipe("tiny", ["distill.steps=4"])) and found.seeds == [0, 1, 2]
    runs = found.of("student", 2, "scene score")
    assert runs.seeds == pytest.approx([0.5, 0.6, 0.7]) and runs.deviation == pytest.approx(0.1)
    assert (runs.shift, runs.prompts) == pytest.approx((FORCED, 0.02))
    assert "| FID, ± between seeds | 6.00 ± 1.00 | 16.00 ± 0.00 |" in capsys.readouterr().out
    assert json.loads(out.read_text())["machine"]


def test_what_is_done_is_not_done_again(trained, tmp_path, capsys):
    out = tmp_path / "spread.json"
    (tmp_path / "die").touch()
    assert tool.main(["tiny", "--out", str(out)]) == 2
    assert "spread-tiny-2: ended with 130; the same command goes on" in capsys.readouterr().err
    assert not out.exists() and len(trained) == 3
    (tmp_path / "die").unlink()
    assert tool.main(["tiny", "--out", str(out)]) == 0
    assert [name for name, _ in trained[3:]] == ["spread-tiny-2", "spread-tiny-kernels"]
    assert tool.main(["tiny", "--out", str(out)]) == 0 and len(trained) == 5


def test_a_run_of_another_recipe_is_not_taken_for_one(trained, tmp_path, capsys):
    assert tool.main(["tiny", "--out", str(tmp_path / "spread.json")]) == 0
    assert tool.main(["tiny", "--out", str(tmp_path / "spread.json"), "distill.steps=5"]) == 2
    assert "a run of another recipe; delete it" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["tiny", "seed=3"], ["tiny", "name=x"], ["nowhere"]])
def test_wrong_input(trained, argv, capsys):
    assert tool.main(argv) == 2 and not trained
    assert capsys.readouterr().err.startswith("sprint: ")
