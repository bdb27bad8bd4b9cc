"""The pages of one evaluation and of several: what stands first, what is marked, what is escaped."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from sprint.base.errors import SprintError
from sprint.evaluate import compare as compare_file
from sprint.evaluate import page as page_file
from sprint.evaluate.compare import compare, difference, differing_protocols, marked, pairs_of
from sprint.evaluate.page import page_html, result_table, worst_first, write_page
from sprint.evaluate.result import Column, Figure, Measured, Result, Shot, Verdicts, share, write_result

SHOTS = [
    Shot("a red circle", 0, "colors"),
    Shot("<script>alert('x')</script> & co", 1, "counting"),
    Shot("two dots", 2),
]
LOWER = {"higher": False}


def column(role="student", steps=1, correct=(True, False, True), fid=3.0, scores=()) -> Column:
    figures = {"scene score": share(sum(correct), len(correct))}
    reasons = [f"seen <{role} {i}>" for i in range(len(correct))]
    measured = {
        "scenes": Measured(figures, Verdicts("scenes", correct, reasons=reasons)),
        "fid": Measured({"FID": Figure(fid, **LOWER)}),
    }
    if scores:
        measured["clip"] = Measured({"CLIP score": Figure(sum(scores))}, Verdicts("scenes", scores=scores))
    return Column(role, steps, f"runs/{role}", "f" * 64, (1.5, 0.0), f"pictures/{role}-{steps}", measured)


def result(*columns, name="tiny", **changes) -> Result:
    protocols = {metric: {"pictures": "3 scenes"} for metric in ("scenes", "fid", "clip")}
    settings = {"seeds": "from 0", "guidance": "4.5", "dtype": "fp32"}
    return dataclasses.replace(
        Result(
            name, columns, {"scenes": SHOTS}, protocols, settings=settings, command="sprint evaluate 'a&b'"
        ),
        **changes,
    )


def with_pictures(folder, found: Result, size=8) -> Result:
    for c in found.columns:
        for shot in SHOTS:
            file = folder / c.folder / shot.file
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(
                np.random.default_rng(shot.seed).integers(0, 256, (size, size, 3), np.uint8)
            ).save(file)
    write_result(folder, found)
    return found


# ---- one evaluation ---------------------------------------------------------------------------------


def test_what_students_fail_most_comes_first_and_then_what_the_teacher_can():
    one, two = column(correct=[True, False, False]), column(steps=2, correct=[True, False, False])
    teacher = column("teacher", 20, correct=[False, False, True])
    assert worst_first(result(one, two, teacher), "scenes") == [2, 1, 0]
    assert worst_first(result(teacher), "scenes") == [0, 1, 2]


def test_lowest_score_of_the_students_comes_first():
    found = result(column(scores=[30.0, 10.0, 20.0]), column("teacher", 20, scores=[1.0, 2.0, 3.0]))
    assert worst_first(found, "clip") == [1, 2, 0]


def test_nothing_on_the_page_is_markup_of_others(tmp_path):
    found = with_pictures(tmp_path, result(column(), left_out={"clip": "<b>fetch</b>"}, recipe="a: <i>"))
    text = write_page(tmp_path, found).read_text()
    assert "<script" not in text and "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; co" in text
    assert (
        "<b>fetch" not in text
        and "seen &lt;student 0&gt;" in text
        and "<i>" not in text.replace("<i class", "")
    )
    assert "sprint evaluate &#x27;a&amp;b&#x27;" in text


def test_pictures_are_inline_and_link_to_the_files(tmp_path):
    found = with_pictures(tmp_path, result(column(), column("teacher", 20)))
    text = write_page(tmp_path, found).read_text()
    links = re.findall(r'<a href="([^"]+)"><img class="pixels" src="data:image/webp;base64,', text)
    assert len(links) == 6 and all((tmp_path / link).is_file() for link in links)
    assert "3 of 3 prompts, worst first" in text
    assert not re.search(r'src="(?!data:)|https?://', text)


def test_a_page_keeps_to_its_size_and_says_how_many_are_shown(tmp_path, monkeypatch):
    found = with_pictures(tmp_path, result(column()), size=64)
    whole = len(page_html(tmp_path, found))
    monkeypatch.setattr(page_file, "PAGE_BYTES", 30_000)
    cut = page_html(tmp_path, found)
    assert "1 of 3 prompts" in cut and len(cut) < whole - 20_000
    assert cut.index("&lt;script") < cut.index("To make it again")  # the failed one is what is left


def test_large_pictures_are_reduced(tmp_path):
    found = with_pictures(tmp_path, result(column()), size=300)
    assert page_html(tmp_path, found).count('width="256" height="256"') == 3


def test_a_picture_that_is_gone_leaves_its_verdict(tmp_path):
    found = with_pictures(tmp_path, result(column()))
    (tmp_path / found.columns[0].folder / SHOTS[0].file).unlink()
    text = page_html(tmp_path, found)
    assert "no picture" in text and "✓ seen &lt;student 0&gt;" in text


def test_the_table_of_the_terminal():
    assert result_table(result(column(), column("teacher", 20, fid=1.5))).splitlines() == [
        "             student, 1 step  teacher, 20 steps",
        "scene score    0.667 ± 0.272      0.667 ± 0.272",
        "FID                    3.000              1.500",
    ]


def test_published_figures_stand_beside_ours_with_their_source(tmp_path):
    beside = Column(
        "published", 1, "a paper", measured={"fid": Measured({"FID": Figure(7.04, **LOWER)})}, called="0.6b"
    )
    found = result(column(), published=[beside], source="published: a paper", left_out={"clip": "fetch it"})
    lines = result_table(found).splitlines()
    assert lines[0].split("  ")[-1] == "published 0.6b, 1 step" and lines[2].endswith(
        "3.000                   7.040"
    )
    assert lines[3:] == ["published: a paper", "clip is left out: fetch it"]
    text = page_html(tmp_path, found)
    assert "Published 0.6b" in text and "published: a paper." in text and "7.040" in text


def test_a_note_stands_behind_a_figure():
    assert str(Figure(16.0, spec=".1f", note="quartiles 15.0 to 238.0")) == "16.0 (quartiles 15.0 to 238.0)"


# ---- several ----------------------------------------------------------------------------------------


@pytest.fixture
def sides(tmp_path):
    """Of the three prompts the second evaluation gains one and loses one."""
    before = result(column(correct=[True, False, True]), column("teacher", 20), name="before")
    after = result(column(correct=[True, True, False], fid=2.0), column("teacher", 20), name="after")
    for found in (before, after):
        with_pictures(tmp_path / found.name, found)
    return [str(tmp_path / "before"), str(tmp_path / "after" / "result.json")]


def test_the_best_figure_of_a_row_is_marked():
    assert marked([Figure(1.0), Figure(2.0), None]) == ["1.000", "2.000 *", "–"]
    assert marked([Figure(1.0, **LOWER), Figure(2.0, **LOWER), Figure(1.0, **LOWER)]) == [
        "1.000 *",
        "2.000",
        "1.000 *",
    ]
    assert marked([Figure(1.0), None, Figure(float("nan"))]) == ["1.000", "–", "–"]


def test_a_difference_within_two_standard_errors_is_noise():
    assert difference("scenes", share(50, 100), share(60, 100)) == "+0.100 ± 0.070, noise"
    assert difference("scenes", share(50, 100), share(70, 100)) == "+0.200 ± 0.068"
    assert difference("fid", Figure(2.0), Figure(1.5)) == "-0.500"
    assert difference("latency", Figure(2.0, 9.0), Figure(1.5, 9.0)) == "-0.500"
    assert difference("fid", Figure(2.0), None) == "–"


def test_compare_puts_what_changed_first(sides, tmp_path):
    text = compare(sides, tmp_path / "pages" / "compare.html")
    assert text.splitlines()[0].split() == ["before", "before", "after", "after"] and "beware" not in text
    assert text.splitlines()[1].count("student, 1 step") == 2
    assert [line.split()[1:] for line in text.splitlines() if line.startswith("FID")] == [
        ["3.000", "3.000", "2.000", "*", "3.000"]
    ]
    page = (tmp_path / "pages" / "compare.html").read_text()
    assert "2 of 6 pictures of the same prompt" in page and "-1.000" in page
    lost, gained = page.index("<p>two dots"), page.index("<p>&lt;script")
    assert lost < gained and "<p>a red circle" not in page and "<script" not in page
    links = re.findall(r'<a href="([^"]+)">', page)
    assert len(links) == 4 and all((tmp_path / "pages" / link).is_file() for link in links)


def test_prompts_and_seeds_must_be_the_same(sides):
    there = compare_file._sides(sides)
    moved = dataclasses.replace(
        there[1].result, sets={"scenes": [SHOTS[0], Shot("two dots", 1), SHOTS[2]._replace(seed=9)]}
    )
    pairs = list(pairs_of([there[0], dataclasses.replace(there[1], result=moved)], "scenes"))
    assert [(pair.shot.seed, pair.columns[0].steps) for pair in pairs] == [(0, 1), (0, 20)]


def test_protocols_that_differ_are_told(sides):
    one, other = compare_file._sides(sides)
    assert differing_protocols([one, other]) == []
    protocols = other.result.protocols | {"fid": {"pictures": "5 scenes"}}
    settings = other.result.settings | {"guidance": "5"}
    changed = dataclasses.replace(other.result, protocols=protocols, settings=settings)
    assert differing_protocols([one, dataclasses.replace(other, result=changed)]) == [
        "guidance differ: before: 4.5; after: 5",
        "FID and KID, pictures differ: before: 3 scenes; after: 5 scenes",
    ]


def test_equal_names_are_told_apart_by_folder(tmp_path):
    for name in ("a", "b"):
        with_pictures(tmp_path / name, result(column()))
    labels = [side.label for side in compare_file._sides([str(tmp_path / "a"), str(tmp_path / "b")])]
    assert labels == ["a", "b"]


def test_two_models_of_one_role_are_held_against_their_own_kind(tmp_path):
    """The first evaluation has two teachers: their figures differ, and the second has one of them."""
    a, b = (
        dataclasses.replace(column("teacher", 20, fid=f), called=name) for f, name in ((1.0, "a"), (2.0, "b"))
    )
    with_pictures(tmp_path / "both", result(a, b, name="both"))
    with_pictures(
        tmp_path / "one", result(dataclasses.replace(a, measured=column(fid=2.5).measured), name="one")
    )
    text = compare([str(tmp_path / "both"), str(tmp_path / "one")], tmp_path / "compare.html")
    assert re.split(r"\s{2,}", text.splitlines()[1].strip()) == [
        "teacher a, 20 steps",
        "teacher b, 20 steps",
        "teacher a, 20 steps",
    ]
    page = (tmp_path / "compare.html").read_text()
    assert "+1.500" in page and "+0.500" not in page


def test_a_damaged_picture_is_named(sides, tmp_path):
    file = tmp_path / "after" / "pictures" / "student-1" / SHOTS[1].file
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(SprintError, match=f"{file}: damaged picture"):
        compare(sides, tmp_path / "compare.html")


def test_one_result_is_nothing_to_compare(sides, tmp_path):
    with pytest.raises(SprintError, match="two results or more"):
        compare(sides[:1], tmp_path / "compare.html")
    with pytest.raises(SprintError, match=r"no result\.json there"):
        compare([sides[0], str(tmp_path)], tmp_path / "compare.html")


# ---- pictures that nothing judges -----------------------------------------------------------------------


def test_pictures_without_a_verdict_are_shown_as_they_are(tmp_path):
    columns = [column(), column("teacher", 20)]
    bare = [dataclasses.replace(c, measured={"fid": c.measured["fid"]}) for c in columns]
    found = with_pictures(tmp_path, result(*bare, protocols={"fid": {}}))
    text = page_html(tmp_path, found)
    assert text.count("<img") == len(SHOTS) * len(columns) and "All 3 prompts" in text
    assert "✓" not in text and "✗" not in text
    assert "<img" not in page_html(tmp_path, dataclasses.replace(found, sets={}))
