"""A card is Markdown that is published: what others wrote shows as itself."""

import shutil
from pathlib import Path

import pytest

from sprint.base.errors import SprintError
from sprint.base.names import BUILT_IN
from sprint.weights.card import escaped, write_card

NASTY = "x\n# heading\n<script>alert(1)</script>\n```\n**bold** [a](http://b) `c` | d"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(BUILT_IN["tiny"], tmp_path / "model"))


@pytest.mark.parametrize("kind", ["SanaPipeline", "SanaSprintPipeline"])
def test_foreign_text_makes_no_headings_and_no_tags(folder, kind):
    (folder / "model_index.json").write_text(f'{{"_class_name": "{kind}"}}')
    facts = {"recipe": NASTY, "teacher": NASTY, "data": NASTY, "prompt": NASTY}
    plain = write_card(folder, {"recipe": "r", "teacher": "t", "data": "d", "prompt": "p"}, "x").read_text()
    text = write_card(folder, facts | {"scores": {NASTY: {NASTY: 1.0}}}, NASTY).read_text()
    prose = list(text.split("```")[::2])
    assert "<script>" not in "".join(prose) and "**bold**" not in "".join(prose)
    assert text.count("```") == plain.count("```")
    headings = [line for line in text.splitlines() if line.startswith("#")]
    extra = ["## Scores"]
    assert len(headings) == len([line for line in plain.splitlines() if line.startswith("#")]) + len(extra)
    assert len([line for line in text.splitlines() if line.startswith("- ")]) == 3


def test_plain_text_stays_as_it_is():
    assert escaped("runs/tiny 0.6B, α") == "runs/tiny 0.6B, α"
    assert escaped("a_b <c>") == r"a\_b &lt;c&gt;"


def test_a_card_of_an_unknown_pipeline(folder):
    for content in ('{"_class_name": []}', '{"_class_name": "FluxPipeline"}', "{}", "[]"):
        (folder / "model_index.json").write_text(content)
        with pytest.raises(SprintError, match=r"model_index\.json"):
            write_card(folder, {})
