"""A look at a data set: what it counts, and what it says is wrong."""

import pytest

from sprint.base.errors import SprintError
from sprint.data.look import Spread, look
from sprint.recipe.schema import Data, DataKind
from tests.data.picture_files import write_pair
from tools.make.pictures import make_pictures


@pytest.fixture
def folder(tmp_path):
    """Six pairs of 20×10 pixels, the last two alike; one without a caption, one that is no picture."""
    for k in range(6):
        write_pair(tmp_path, f"{k}", color=(min(k, 4),) * 3, caption="c" * (min(k, 4) + 1), size=(20, 10))
    write_pair(tmp_path, "6").with_suffix(".txt").unlink()
    write_pair(tmp_path, "7").write_bytes(b"<html>")
    return tmp_path


def facts_of(path, kind="folder", **settings):
    limits = {key: settings.pop(key) for key in ("most", "first", "seconds") if key in settings}
    return look(
        Data(kind=DataKind(kind), path=str(path), **{"size": 12, "bad_share": 0.5} | settings), **limits
    )


def test_everything_is_counted(folder):
    facts = facts_of(folder, first=2)
    assert (facts.samples, facts.looked_at, facts.formats) == (8, 8, {"PNG": 6})
    assert (facts.heights, facts.widths) == (Spread(10, 10, 10), Spread(20, 20, 20))
    assert facts.captions == Spread(1, 4, 5) and facts.same_caption == (2, "ccccc")
    assert (facts.small, facts.repeated) == (6, 1)
    assert facts.bad == {"missing caption": 1, "unreadable picture": 1} and len(facts.examples) == 2
    assert [shown.caption for shown in facts.first] == ["c", "cc"] and facts.first[0].picture.shape == (
        12,
        12,
        3,
    )
    assert len(facts.lines()) == 3 and len(facts.problems()) == 4
    assert "2 samples cannot be used (1 missing caption, 1 unreadable picture)" in facts.problems()[0]


def test_pictures_of_the_command_have_nothing_wrong(tmp_path):
    make_pictures(tmp_path, 50)
    facts = facts_of(tmp_path, size=64)
    assert facts.samples == 50 and facts.problems() == [] and facts.formats == {"PNG": 50}
    make_pictures(tmp_path / "again", 3)
    for name in ("0002.png", "0002.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_of_many_some_are_looked_at_over_all(tmp_path):
    for k in range(30):
        write_pair(tmp_path, f"{k:02}", caption=f"caption {k}")
    facts = facts_of(tmp_path, most=3, size=8)
    assert (facts.samples, facts.looked_at) == (30, 3)
    assert [shown.caption for shown in facts.first] == ["caption 0", "caption 10", "caption 20"]
    assert facts_of(tmp_path, seconds=0.0).looked_at == 1


def test_prompts_have_captions_alone(tmp_path):
    (tmp_path / "p.txt").write_text("one\nthree\n")
    facts = facts_of(tmp_path / "p.txt", "prompts")
    assert facts.captions == Spread(3, 5, 5) and not facts.formats and facts.problems() == []


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(SprintError, match="nothing to look at"):
        facts_of("", "scenes")
    with pytest.raises(SprintError, match="no such folder"):
        facts_of(tmp_path / "none")
