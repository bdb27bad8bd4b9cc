"""GenEval's rules on hand-made detections, category by category, and the summary's arithmetic."""

import json

import numpy as np
import pytest

from sprint.base.errors import SprintError
from sprint.evaluate.metrics.geneval_rules import (
    CLASSES,
    COLORS,
    MAX_OBJECTS,
    PICTURES,
    PROMPTS,
    Detection,
    Requirement,
    Task,
    Verdict,
    judge,
    relative_position,
    summary,
)

BOX = (0.0, 0.0, 10.0, 10.0)


def task(tag, *include, exclude=()):
    return Task(tag, "a photo", include, exclude)


def found(*scores, box=BOX):
    return [Detection(box, score) for score in scores]


def no_colors(name, objects):
    raise AssertionError("asked for a colour that does not matter")


def by_score(colors):
    """A colour classifier that knows each object by its score."""
    return lambda name, objects: [colors[d.score] for d in objects]


def verdict(task, detections, colors=no_colors):
    result = judge(task, detections, colors)
    assert result.correct == (result.reason == "")
    return result


# ---- one and two objects ------------------------------------------------------------------------------


def test_a_single_object_is_there_or_not():
    bench = task("single_object", Requirement("bench", 1))
    assert verdict(bench, {"bench": found(0.5)}) == Verdict(True, "")
    assert verdict(bench, {"cat": found(0.9)}) == Verdict(False, "expected bench>=1, found 0")
    assert verdict(bench, {}) == Verdict(False, "expected bench>=1, found 0")


def test_more_objects_than_asked_for_and_others_do_no_harm():
    bench = task("single_object", Requirement("bench", 1))
    assert verdict(bench, {"bench": found(0.5, 0.6, 0.7), "cat": found(0.9)}).correct


@pytest.mark.parametrize(("score", "correct"), [(0.3, False), (0.300001, True), (0.1, False)])
def test_an_object_scores_more_than_0_3(score, correct):
    assert verdict(task("single_object", Requirement("bench", 1)), {"bench": found(score)}).correct == correct


def test_both_of_two_objects_are_needed():
    both = task("two_object", Requirement("cat", 1), Requirement("dog", 1))
    assert verdict(both, {"cat": found(0.5), "dog": found(0.5)}).correct
    assert verdict(both, {"cat": found(0.5)}).reason == "expected dog>=1, found 0"
    assert verdict(both, {"dog": found(0.5)}).reason == "expected cat>=1, found 0"
    assert verdict(both, {}).reason == "expected cat>=1, found 0\nexpected dog>=1, found 0"


# ---- counting -----------------------------------------------------------------------------------------


def count(n):
    return task("counting", Requirement("cat", n), exclude=(Requirement("cat", n + 1),))


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([0.95] * 3, ""),
        ([0.95] * 2, "expected cat>=3, found 2"),
        ([0.95] * 4, "expected cat<4, found 4"),
        ([0.95] * 3 + [0.9], ""),  # the fourth is not sure enough to be one too many
        ([0.95] * 2 + [0.9], "expected cat>=3, found 2"),
        ([0.95] * 2 + [0.900001], ""),
        ([0.95] * 2 + [0.5, 0.6], "expected cat>=3, found 2"),
    ],
)
def test_three_cats(scores, reason):
    assert verdict(count(3), {"cat": found(*scores)}).reason == reason


def test_the_higher_limit_is_for_counting_alone():
    two = Requirement("cat", 2)
    assert verdict(task("two_object", two), {"cat": found(0.5, 0.5)}).correct
    assert not verdict(task("counting", two), {"cat": found(0.5, 0.5)}).correct


def test_at_most_16_of_a_class_are_seen():
    many = {"cat": found(*[0.95] * 30)}
    assert verdict(task("counting", Requirement("cat", MAX_OBJECTS)), many).correct
    assert verdict(task("counting", Requirement("cat", 17)), many).reason == "expected cat>=17, found 16"
    assert verdict(count(3), many).reason == "expected cat<4, found 16"


def test_others_may_be_there_when_one_class_is_counted():
    assert verdict(count(2), {"cat": found(0.95, 0.95), "dog": found(*[0.99] * 9)}).correct


# ---- colours ------------------------------------------------------------------------------------------


def test_an_object_has_its_colour_or_another():
    red_car = task("colors", Requirement("car", 1, "red"))
    assert verdict(red_car, {"car": found(0.5)}, by_score({0.5: "red"})).correct
    wrong = verdict(red_car, {"car": found(0.5)}, by_score({0.5: "blue"}))
    assert wrong.reason == "expected red car>=1, found 0 red; and 1 blue"
    assert verdict(red_car, {}).reason == "expected car>=1, found 0"


def test_the_colour_of_the_most_confident_object_counts():
    red_car = task("colors", Requirement("car", 1, "red"))
    colors = by_score({0.9: "red", 0.5: "blue"})
    assert verdict(red_car, {"car": found(0.5, 0.9)}, colors).correct
    assert not verdict(
        task("colors", Requirement("car", 1, "blue")), {"car": found(0.5, 0.9)}, colors
    ).correct


def test_of_equally_confident_objects_the_later_is_first():
    """The official program turns numpy's rising order round."""
    red, blue = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0)
    cats = {"cat": [Detection(red, 0.9), Detection(blue, 0.9)]}
    by_place = {red: "red", blue: "blue"}

    def color(name, objects):
        return [by_place[d.box] for d in objects]

    assert not verdict(task("colors", Requirement("cat", 1, "red")), cats, color).correct
    assert verdict(task("colors", Requirement("cat", 1, "blue")), cats, color).correct
    scores = np.array([0.5, 0.9, 0.9, 0.7, 0.9, 0.2])
    official = [i for i in np.argsort(scores, kind="stable")[::-1] if scores[i] > 0.3]
    seen = []
    many = {"cat": [Detection((float(i), 0, 1, 1), float(score)) for i, score in enumerate(scores)]}
    judge(
        task("colors", Requirement("cat", 5, "red")),
        many,
        lambda name, objects: seen.extend(int(d.box[0]) for d in objects) or ["red"] * len(objects),
    )
    assert seen == official == [4, 2, 1, 3, 0]


def test_every_one_of_several_has_the_colour():
    two_red = task("colors", Requirement("car", 2, "red"))
    result = verdict(two_red, {"car": found(0.9, 0.8, 0.7)}, by_score({0.9: "red", 0.8: "green", 0.7: "red"}))
    assert result.reason == "expected red car>=2, found 1 red; and 1 red, 1 green"


def test_the_classifier_is_told_the_class():
    asked = []

    def colors(name, objects):
        asked.append((name, [d.score for d in objects]))
        return ["red"] * len(objects)

    verdict(
        task("colors", Requirement("car", 1, "red"), Requirement("cat", 1)), {"car": found(0.5, 0.9)}, colors
    )
    assert asked == [("car", [0.9])]


def test_each_of_two_objects_has_its_own_colour():
    swapped = task("color_attr", Requirement("car", 1, "red"), Requirement("cat", 1, "black"))
    seen = {"car": found(0.9), "cat": found(0.8)}
    assert verdict(swapped, seen, by_score({0.9: "red", 0.8: "black"})).correct
    assert verdict(swapped, seen, by_score({0.9: "black", 0.8: "red"})).reason == (
        "expected red car>=1, found 0 red; and 1 black\nexpected black cat>=1, found 0 black; and 1 red"
    )


# ---- position -----------------------------------------------------------------------------------------


def beside(relation):
    return task("position", Requirement("dog", 1), Requirement("cat", 1, position=(relation, 0)))


def at(x, y, side=10.0, score=0.5):
    return [Detection((x, y, x + side, y + side), score)]


@pytest.mark.parametrize(
    ("place", "relation"),
    [((0, 50), "left of"), ((100, 50), "right of"), ((50, 0), "above"), ((50, 100), "below")],
)
def test_an_object_stands_on_its_side_of_another(place, relation):
    seen = {"dog": at(50, 50), "cat": at(*place)}
    assert verdict(beside(relation), seen).correct
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
    assert (
        verdict(beside(opposite), seen).reason == f"expected cat {opposite} target, found {relation} target"
    )


def test_a_diagonal_is_two_relations():
    seen = {"dog": at(50, 50), "cat": at(0, 0)}
    assert verdict(beside("left of"), seen).correct and verdict(beside("above"), seen).correct
    assert (
        verdict(beside("below"), seen).reason == "expected cat below target, found left of and above target"
    )


def test_without_its_target_nothing_has_a_position():
    assert verdict(beside("left of"), {"cat": at(0, 0)}).reason == (
        "expected dog>=1, found 0\nno target for cat to be left of"
    )
    red_dog = task("position", Requirement("dog", 1, "red"), Requirement("cat", 1, position=("above", 0)))
    result = verdict(red_dog, {"dog": at(50, 50), "cat": at(50, 0)}, lambda name, objects: ["blue"])
    assert result.reason.endswith("\nno target for cat to be above")


def test_the_most_confident_objects_are_compared():
    seen = {"dog": at(50, 50, score=0.9), "cat": at(0, 50, score=0.4) + at(100, 50, score=0.8)}
    assert verdict(beside("right of"), seen).correct
    assert not verdict(beside("left of"), seen).correct


def test_every_pair_stands_in_the_relation():
    seen = {"dog": at(50, 50), "cat": at(0, 50, score=0.8) + at(100, 50, score=0.9)}
    both_left = task("position", Requirement("dog", 1), Requirement("cat", 2, position=("left of", 0)))
    assert verdict(both_left, seen).reason == "expected cat left of target, found right of target"


def shifted(x, y, side=10.0):
    """Relations of a box to an equal one, from which it is shifted by (x, y)."""
    return relative_position((x, y, x + side, y + side), (0, 0, side, side))


def test_equal_boxes_have_no_relation():
    assert shifted(0, 0) == set()


@pytest.mark.parametrize(("x", "expected"), [(2, set()), (-2, set()), (4, set()), (4.01, {"right of"})])
def test_the_margin_is_a_tenth_of_both_widths(x, expected):
    """Two boxes 10 wide: 2 px are taken off, and (x − 2) / x must pass 0.5, which it does from 4 px on."""
    assert shifted(x, 0) == expected


def test_less_than_a_thousandth_of_a_pixel_is_no_offset():
    assert shifted(0.0009, 0, side=1e-4) == set()
    assert shifted(0.0011, 0, side=1e-4) == {"right of"}


def test_a_side_reaches_60_degrees_up_and_down():
    """With small boxes the margin hardly counts: cos 59° passes, cos 61° does not."""
    for degrees, expected in (
        (59, {"right of", "below"}),
        (61, {"below"}),
        (31, {"right of", "below"}),
        (29, {"right of"}),
    ):
        x, y = 1e4 * np.cos(np.radians(degrees)), 1e4 * np.sin(np.radians(degrees))
        assert shifted(x, y, side=1e-3) == expected


def test_the_shortened_offset_is_divided_by_the_whole_one():
    """(30, 40) less 10 each way is (20, 30), over 50: 0.4 and 0.6. Over its own length both would pass 0.5."""
    assert shifted(30, 40, side=50) == {"below"}


def test_the_margin_counts_both_extents():
    wide = (0, 0, 100, 10)  # centre 50, 5
    assert relative_position((60, 0, 70, 10), wide) == set()  # 15 px off; the margin is 11, and 4 / 15 < 0.5
    assert relative_position((80, 0, 90, 10), wide) == {"right of"}  # 35 px off: 24 / 35


# ---- the score ----------------------------------------------------------------------------------------


def test_overall_is_the_mean_over_categories():
    """Three of four single objects, none of one counted: (0.75 + 0) / 2, though 3 of 5 pictures are correct."""
    bench, clock, cats = (
        Task("single_object", "a bench", (Requirement("bench", 1),)),
        Task("single_object", "a clock", (Requirement("clock", 1),)),
        count(2),
    )
    right, wrong = Verdict(True, ""), Verdict(False, "no")
    result = summary([bench, cats, bench, clock, clock], [right, wrong, right, wrong, right])
    assert result["overall"] == 0.375
    assert result["tags"] == {
        "single_object": {"share": 0.75, "correct": 3, "pictures": 4},
        "counting": {"share": 0.0, "correct": 0, "pictures": 1},
    }
    assert result["images"] == 0.6
    assert result["prompts"] == pytest.approx(2 / 3)  # the cats were never right
    assert result["by_prompt"] == [
        {"prompt": "a bench", "tag": "single_object", "correct": 2, "pictures": 2},
        {"prompt": "a photo", "tag": "counting", "correct": 0, "pictures": 1},
        {"prompt": "a clock", "tag": "single_object", "correct": 1, "pictures": 2},
    ]
    assert not result["official"]
    json.dumps(result)


def test_what_is_official():
    tasks = [
        Task(tag, f"{tag} {i}", (Requirement("cat", 1),))
        for tag, prompts in PROMPTS.items()
        for i in range(prompts)
    ]
    assert len(tasks) == 553
    all_of_them = tasks * PICTURES
    assert summary(all_of_them, [Verdict(True, "")] * len(all_of_them))["official"]
    for fewer in (tasks, tasks[1:] * PICTURES, all_of_them[1:]):
        assert not summary(fewer, [Verdict(True, "")] * len(fewer))["official"]


def test_nothing_to_score():
    with pytest.raises(SprintError, match="0 tasks"):
        summary([], [])
    with pytest.raises(SprintError, match="1 tasks and 2 verdicts"):
        summary([count(2)], [Verdict(True, "")] * 2)


def test_80_classes_and_10_colours():
    assert len(set(CLASSES)) == 80
    assert len(set(COLORS)) == 10
