"""What a run came to, in figures and in two sentences."""

from dataclasses import replace

from sprint.evaluate.result import Result
from sprint.train.report.verdict import (
    Goal,
    best_student,
    distillation_goals,
    headline,
    in_reading_order,
    key_figures,
)
from tests.train.report.test_report import column, full_result


def result(*columns) -> Result:
    return replace(full_result(), columns=columns)


TEACHER = column("teacher", 20, 0.2, 0.8, 3.0)
WEAK, STRONG = column("student", 1, 0.0125, 0.24, 70.0), column("student", 4, 0.04, 0.744, 4.0)


def test_goals_compare_with_the_teacher():
    goals = {goal.text: goal for goal in distillation_goals(full_result())}
    assert goals["FID ÷ teacher's, 1 step"] == Goal("FID ÷ teacher's, 1 step", "≤ 1.2", "1.500", False)
    assert goals["FID ÷ teacher's, 4 steps"] == Goal("FID ÷ teacher's, 4 steps", "≤ 1.5", "1.600", False)
    text = "Scene score ÷ teacher's, 1 step"
    assert goals[text] == Goal(text, "≥ 1", "0.900", False)
    assert goals["Colors ÷ teacher's, 1 step"].met
    text = "Scene score ÷ teacher's, 4 steps"
    assert goals[text] == Goal(text, "≥ 0.75", "0.700", False)
    assert "FID ÷ teacher's, 2 steps" not in goals  # not measured


def test_the_page_opens_with_the_column_that_one_would_use():
    found = result(WEAK, STRONG, TEACHER)
    assert headline(found, distillation_goals(found)) == (
        "4 steps keep 93% of the 20-step teacher's scene score at 5.0× its speed; 1 step keeps 30%. "
        "4 of 8 goals are met; short of them fall FID, Colors, Counting, Scene score at 1 step."
    )


def test_one_step_that_is_best_stands_alone():
    found = full_result()
    assert headline(found, []) == "1 step keeps 90% of the 20-step teacher's scene score at 16.0× its speed."
    assert headline(found, [Goal("a", "b", "c", True)]).endswith(" speed. Every goal is met.")
    missed = [
        Goal(f"{what} ÷ teacher's, {at}", "", "", False)
        for what in ("FID", "Colors")
        for at in ("1 step", "4 steps")
    ]
    assert headline(found, missed).endswith(
        " 0 of 4 goals are met; short of them fall FID, Colors at 1 step; FID, Colors at 4 steps."
    )


def test_of_equal_columns_the_fastest_is_best():
    assert best_student(result(STRONG, replace(STRONG, steps=2))).steps == 2


def test_nothing_is_said_of_what_was_not_measured():
    bare = replace(STRONG, measured={})
    assert "drawn" in headline(result(bare), []) and key_figures(result(bare)) == []
    assert headline(result(TEACHER), []) == headline(None, []) == "Trained; no pictures were drawn."
    assert "%" not in headline(result(STRONG), [])  # no teacher
    without_pace = {name: found for name, found in STRONG.measured.items() if name != "pace"}
    assert headline(result(replace(STRONG, measured=without_pace), TEACHER), []) == (
        "4 steps keep 93% of the 20-step teacher's scene score."
    )


def test_a_student_beside_a_teacher_that_draws_nothing_right():
    assert "%" not in headline(result(WEAK, column("teacher", 20, 0.2, 0.0, 3.0)), [])


def test_figures_are_of_the_best_column_beside_the_teachers():
    assert key_figures(result(WEAK, STRONG, TEACHER)) == [
        ("0.74", "scene score, 4 steps", "teacher 0.80"),
        ("4.00", "FID, 4 steps", "teacher 3.00"),
        ("40 ms", "a picture, 4 steps", "5.0× as fast as the teacher"),
    ]


def test_reading_order():
    titles = [c.title for c in in_reading_order(full_result()).columns]
    assert titles == ["teacher, 20 steps", "undistilled, 1 step", "student, 1 step", "student, 4 steps"]
