"""The page says what it is given, alone, and safely."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sprint.evaluate.result import Column, Figure, Measured, Result, Shot, Verdicts
from sprint.pages.chart import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Scale,
    line_chart,
    running_median,
)
from sprint.pages.grid import (
    CELL,
    GAP,
    HEADER,
    MARGIN,
    grid_size,
    picture_grid,
    resize_picture,
)
from sprint.pages.png import write_png
from sprint.train.report.curves import Curve, training_curves, update_times
from sprint.train.report.report import Report, write_report
from sprint.train.report.verdict import Goal, distillation_goals

SHOTS = [Shot("a red circle", 0, "colors"), Shot('two <script>alert("x")</script> squares', 1, "color_attr")]


def picture(value):
    return np.full((64, 64, 3), value, np.uint8)


def column(role, steps, seconds, overall, fid):
    shares = {"scene score": overall, "colors": overall, "counting": overall / 2, "color attr": 0.25}
    verdicts = Verdicts("scenes", [True, False], reasons=["red circle", "nothing"])
    measured = {
        "scenes": Measured({name: Figure(value, 0.02) for name, value in shares.items()}, verdicts),
        "fid": Measured({"FID": Figure(fid, higher=False)}),
        "pace": Measured({"drawing, ms a picture": Figure(1000 * seconds, higher=False, spec=".1f")}),
    }
    return Column(role, steps, "m", "f" * 64, folder=f"pictures/{role}-{steps}", measured=measured)


def full_result() -> Result:
    columns = [
        column("student", 1, 0.0125, 0.72, 4.5),
        column("student", 4, 0.04, 0.56, 4.8),
        column("teacher", 20, 0.2, 0.8, 3.0),
        column("undistilled", 1, 0.0125, 0.1, 15.0),
    ]
    protocols = {
        "scenes": {"pictures": "2 scenes"},
        "fid": {"floor": "as many real scenes again"},
        "pace": {},
    }
    return Result("tiny", columns, {"scenes": SHOTS}, protocols)


def full_report():
    return Report(
        name="tiny & small",
        result=full_result(),
        goals=distillation_goals(full_result()),
        curves=[Curve("Stage 1: flow loss", {"this run": [(1, 0.5), (2, 0.25)]})],
        seconds={"Stage 1": 100.0, "Stage 2": 500.0},
        peak_memory=3 * 2**30,
        recipe="name: tiny\nseed: 7\n",
        command="sprint distill recipes/tiny.yaml",
        environment={"torch": "2.11.0"},
        notes=["Made up for a test."],
    )


def with_pictures(folder, result):
    """In each column a dark one and a light one."""
    for c in result.columns:
        for shot, value in zip(SHOTS, (10, 200), strict=True):
            write_png(folder / "evaluation" / c.folder / shot.file, picture(value))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with_pictures(folder, full_result())
    path = write_report(folder, full_report())
    return folder, path.read_text(encoding="utf-8")


# ---- the page ---------------------------------------------------------------------------------------


def test_three_files_and_no_scraps(written):
    folder, _ = written
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    assert files == ["report.html", "report.json", "samples.png"]


def test_the_page_loads_nothing(written):
    _, page = written
    assert "http://" not in page and "https://" not in page and "//cdn" not in page
    assert not re.search(r"<(script|link|iframe|object|embed)\b|@import|url\(", page)
    assert {source[:23] for source in re.findall(r'src="([^"]*)"', page)} == {"data:image/webp;base64,"}
    assert "default-src 'none'" in page


def test_its_pictures_are_those_of_the_evaluation(written):
    """The same code sets them: small ones inline, each with its mark and a link to the file."""
    folder, page = written
    links = re.findall(r'<a href="([^"]+)"><img', page)
    assert len(links) == 8 and all((folder / link).is_file() for link in links)
    assert page.count("<small>✓ </small>") == page.count("<small>✗ </small>") == 4
    assert "evaluation/index.html" in page


def test_columns_stand_in_reading_order(written):
    _, page = written
    head = re.search('<div class="row head".*?</div>', page)[0]
    assert re.findall("<span>([^<]*)<small>([^<]*)<", head) == [
        ("Teacher", "20 steps"), ("Undistilled", "1 step"), ("Student", "1 step"), ("Student", "4 steps"),
    ]  # fmt: skip


def test_what_people_wrote_is_escaped(written):
    _, page = written
    assert "two &lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; squares" in page
    assert "<h1>tiny &amp; small</h1>" in page


def test_every_text_field_is_escaped(tmp_path):
    evil = "<b id='evil'>"
    report = Report(
        evil,
        Result(evil, [Column(evil, 1, evil)], left_out={evil: evil}, protocols={evil: {evil: evil}}),
        goals=[Goal(evil, evil, evil, False)],
        curves=[Curve(evil, {evil: [(0, 1), (1, 2)], "b": [(0, 1)]}, evil, evil, note=evil)],
        seconds={evil: 1.0},
        recipe=evil,
        command=evil,
        environment={evil: evil},
        notes=[evil],
    )
    page = write_report(tmp_path, report).read_text()
    assert "&lt;b id=" in page
    assert "<b id" not in page


def test_the_page_holds_the_numbers(written):
    _, page = written
    assert "12 ms" in page and "16.0× as fast" in page  # 0.2 / 0.0125
    for cell in ("0.720 ± 0.020", "15.000", "1.500", "200.0", "10 min 0 s", "3.0 GiB", "seed: 7", "2.11.0"):
        assert cell in page, cell
    for text in (
        "attribute binding",
        "sprint distill recipes/tiny.yaml",
        "Made up for a test.",
        "2 held-out prompts",
        "Another seed or another processor",
        "Read it together with FID",
        "floor: as many real scenes again",
    ):
        assert text in page, text


def test_missing_parts_are_left_out(tmp_path):
    page = write_report(tmp_path, Report("0.6b", recipe="name: 0.6b")).read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["To make it again"]
    assert "None" not in page and "Trained; no pictures were drawn." in page
    assert not (tmp_path / "samples.png").exists()


def test_a_metric_that_failed_is_told(tmp_path):
    found = Result("t", [Column("student", 1, "m")], left_out={"scenes": "no scipy"})
    assert "Scene score left out: no scipy" in write_report(tmp_path, Report("t", found)).read_text()


def test_json_holds_the_same_without_pictures(tmp_path):
    bad = column("student", 1, 0.5, 0.25, float("nan"))
    measured = {name: replace(found, verdicts=None) for name, found in bad.measured.items()}
    report = replace(full_report(), result=Result("t", [replace(bad, measured=measured)]))
    write_report(tmp_path, report)
    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["columns"] == [
        {
            "role": "student",
            "steps": 1,
            "seconds_per_picture": 0.5,
            "scores": {
                "overall": 0.25,
                "categories": {"counting": 0.125, "colors": 0.25, "color_attr": 0.25},
            },
            "fid": None,
            "key": "student_1",
        }
    ]
    assert data["peak_memory"] == 3 * 2**30
    assert data["curves"][0]["lines"]["this run"] == [[1, 0.5], [2, 0.25]]


# ---- curves -----------------------------------------------------------------------------------------


def test_curves_come_from_the_metrics():
    rows = [
        {"stage": "adapt", "step": 1, "phase": "flow", "loss": 0.5, "grad_norm": None},
        {"stage": "distill", "step": 1, "phase": "G", "loss_adv": 0.25, "loss_self": 0.1, "logvar": -7.0},
        {"stage": "distill", "step": 2, "phase": "D", "loss": 2.0, "loss_r2": 0.3},
        {"stage": "distill", "step": 3, "phase": "F", "loss": 1.5, "grad_norm": 4.0},
        {"stage": "distill", "step": 4, "phase": "G", "loss_dmd": 0.75},
    ]
    curves = {c.title: c.lines for c in training_curves(rows)}
    assert curves == {
        "Stage 1: flow loss": {"loss": [(1, 0.5)]},
        "Stage 2: adversarial losses": {"student": [(1, 0.25)], "discriminator": [(2, 2.0)]},
        "Stage 2: penalties of the discriminator": {"R2": [(2, 0.3)]},
        "Stage 2: distribution matching": {"student": [(4, 0.75)], "fake score": [(3, 1.5)]},
        "Stage 2: self-consistency": {"distance": [(1, 0.1)]},
        "Stage 2: gradient norms": {"fake score": [(3, 4.0)]},
        "Stage 2: log-variance weight": {"logvar": [(1, -7.0)]},
    }


# ---- the time of an update ------------------------------------------------------------------------------

TIMED = [
    {"stage": "adapt", "step": 1, "phase": "flow", "loss": 1.0},  # logged before there were times
    {"stage": "adapt", "step": 2, "phase": "flow", "ms_data": 1.0, "ms_forward": 19.0, "ms_other": 0.0},
    {"stage": "distill", "step": 1, "phase": "G", "ms_student": 900.0, "ms_other": 7.0},  # the first is slow
    {"stage": "distill", "step": 3, "phase": "G", "ms_student": 60.0, "ms_other": 5.0, "ms_teacher": 35.0},
    {"stage": "distill", "step": 5, "phase": "G", "ms_student": 50.0, "ms_other": 6.0, "ms_teacher": 34.0},
    {"stage": "distill", "step": 2, "phase": "D", "ms_odd part": 10.0, "ms_other": 40.0},
]


def test_times_of_an_update_are_medians_in_order():
    times = update_times(TIMED)
    assert times == {
        "Stage 1": {"data": 1.0, "forward": 19.0, "other": 0.0},
        "Stage 2, student": {"teacher": 34.0, "student": 60.0, "other": 6.0},
        "Stage 2, discriminator": {"odd part": 10.0, "other": 40.0},
    }
    assert [list(parts) for parts in times.values()] == [
        ["data", "forward", "other"],
        ["teacher", "student", "other"],
        ["odd part", "other"],
    ]
    assert update_times(TIMED[:1]) == {}


def test_the_page_shows_a_bar_and_a_column_for_each_kind_of_update(tmp_path):
    """The longest, 100 ms, fills the width; a part too small for its name has none."""
    page = write_report(tmp_path, Report("tiny", update_times=update_times(TIMED))).read_text()
    bars = re.findall('<p>([^<]*) <b>([^<]*)</b></p><div class="stack">(.*?)</div>', page)
    assert [(name, whole) for name, whole, _ in bars] == [
        ("Stage 1", "20 ms"),
        ("Stage 2, student", "100 ms"),
        ("Stage 2, discriminator", "50 ms"),
    ]
    pieces = [re.findall(r'class="([^"]*)" style="width:([\d.]+)%"[^>]*>([^<]*)<', bar) for *_, bar in bars]
    assert pieces[1] == [
        ("part-teacher", "34.00", "teacher"),
        ("part-student", "60.00", "student"),
        ("part-other", "6.00", ""),
    ]
    assert pieces[2][0] == ("part-odd-part", "10.00", "odd part")
    rows = {
        name: re.findall("<td>([^<]*)</td>", cells)
        for name, cells in re.findall(
            r'<th scope="row">(?:<i class="swatch [^"]*"></i>)?([^<]*)</th>(.*?)</tr>', page
        )
    }
    assert rows["the whole update"] == ["20 ms", "100 ms", "50 ms"]
    assert rows["student"] == ["–", "60 ms · 60%", "–"]
    assert rows["other"] == ["0.0 ms · 0%", "6.0 ms · 6%", "40 ms · 80%"]
    assert list(rows) == ["the whole update", "data", "teacher", "student", "forward", "odd part", "other"]


def test_a_part_with_an_evil_name_is_escaped(tmp_path):
    page = write_report(tmp_path, Report("t", update_times={"<b>": {'"><i onclick="': 1.0}})).read_text()
    assert "<b>&lt;b" not in page and "onclick=&quot;" in page and 'onclick="' not in page


# ---- charts -----------------------------------------------------------------------------------------


def test_scale_maps_ends_and_middle():
    assert [Scale(0, 10, 100, 300)(v) for v in (0, 5, 10)] == [100, 200, 300]
    assert [Scale(1, 100, 300, 100, log=True)(v) for v in (1, 10, 100)] == [300, 200, 100]


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 10, 0, 1), [0, 5, 10]),
        (Scale(-0.1, 0.35, 0, 1), [0, 0.2]),
        (Scale(0.5, 2000, 0, 1, log=True), [1, 10, 100, 1000]),
        (Scale(2, 9, 0, 1, log=True), [2, 4, 6, 8]),
    ],
)
def test_ticks_are_round(scale, ticks):
    assert scale.ticks() == ticks


def polyline(svg):
    points = re.search(r'class="smooth line-0" points="([^"]*)"', svg)[1]
    return [tuple(map(float, pair.split(","))) for pair in points.split()]


def test_chart_puts_points_where_they_belong():
    """The y axis has 6% of air on either side: 0 lies 6/112 of the frame above its foot."""
    svg = line_chart({"a": [(0, 0.0), (50, 5.0), (100, 10.0)]}, "step", "loss")
    air = (BOTTOM - TOP) * 6 / 112
    expected = [(LEFT, BOTTOM - air), ((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2), (RIGHT, TOP + air)]
    np.testing.assert_allclose(polyline(svg), expected, atol=0.051)


def test_log_chart_spaces_decades_evenly_and_drops_zero():
    ys = [
        y for _, y in polyline(line_chart({"a": [(0, 0.0), (1, 1), (2, 10), (3, 100)]}, "s", "n", log_y=True))
    ]
    assert len(ys) == 3
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)
    assert ys[0] > ys[1]


def test_a_flat_line_is_drawn():
    assert {y for _, y in polyline(line_chart({"a": [(0, 3.0), (1, 3.0)]}, "s", "l"))} == {(TOP + BOTTOM) / 2}


def test_values_show_under_the_pointer():
    assert "<title>a: 0.25 at 7</title>" in line_chart({"a": [(7, 0.25)]}, "s", "l")


def test_running_median_ignores_a_spike_and_keeps_few_points():
    line = [(i, 1.0) for i in range(100)]
    line[50] = (50, 1e6)
    assert running_median(line)[50] == (50, 1.0)
    assert running_median(line[40:60])[10] == (50, 1.0)
    assert running_median(line[48:53]) == line[48:53]


def test_a_curve_of_zeros_on_a_log_axis_is_left_out(tmp_path):
    report = Report("tiny", curves=[Curve("norm", {"n": [(1, 0.0)]}, log_y=True)])
    assert "<svg" not in write_report(tmp_path, report).read_text()


# ---- the grid ---------------------------------------------------------------------------------------


def test_samples_have_a_row_a_caption_and_a_column_a_sampler(written):
    folder, _ = written
    with Image.open(folder / "samples.png") as image:
        assert image.size == grid_size(rows=2, columns=4)
        right = image.width - MARGIN - CELL // 2
        middle = MARGIN + HEADER + CELL // 2
        assert image.getpixel((right, middle)) == (10, 10, 10)
        assert image.getpixel((right, middle + CELL + GAP)) == (200, 200, 200)


def test_captions_stay_in_their_column():
    """Nothing but paper between captions and pictures, however long the words."""
    long = ["word " * 80, "w" * 300]
    grid = np.array(picture_grid([("T", "1")], long, [[picture(0), picture(0)]]))
    assert (grid[MARGIN + HEADER :, -MARGIN - CELL - GAP : -MARGIN - CELL] == 255).all()
    assert (grid[MARGIN + HEADER : MARGIN + HEADER + CELL, :200] < 100).any()


@pytest.mark.parametrize(("shape", "size"), [((64, 64), (128, 128)), ((512, 256), (64, 128))])
def test_pictures_keep_their_shape(shape, size):
    assert resize_picture(np.zeros((*shape, 3), np.uint8), 128).size == size


def test_a_point_that_is_alone_is_seen():
    corners = re.findall(r'<polyline[^>]* points="([^"]*)"', line_chart({"loss": [(1, 2.0)]}, "step", "loss"))
    (left, right) = ([float(number) for number in place.split(",")] for place in corners[0].split())
    assert left[0] < right[0] and left[1] == right[1]
