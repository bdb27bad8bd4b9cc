"""What a run's report keeps of a column, and when it draws it anew."""

import json
from dataclasses import replace

import numpy as np

from sprint.train.report.columns import Origin, load_column, save_column
from sprint.train.report.report import Column, Role, Scores

ORIGIN = Origin("abc", (1.5708, 1.3, 0.0), "scene network 1")


def test_a_column_is_kept_for_what_it_came_from(tmp_path):
    pictures = [np.full((8, 8, 3), level, np.uint8) for level in (3, 200)]
    column = Column(Role.student, 2, 0.5, Scores(0.25, {"colors": 0.5}), 3.0, pictures)
    save_column(column, tmp_path, ORIGIN)
    back = load_column(Role.student, 2, tmp_path, ORIGIN)
    assert np.array_equal(back.pictures, pictures)
    assert replace(back, pictures=()) == replace(column, pictures=())
    for other in ({"model": "abd"}, {"times": (1.5708, 1.1, 0.0)}, {"network": "scene network 2"}):
        assert load_column(Role.student, 2, tmp_path, replace(ORIGIN, **other)) is None, other
    assert load_column(Role.student, 4, tmp_path, ORIGIN) is None


def test_a_column_that_tells_no_origin_is_not_used(tmp_path):
    save_column(
        Column(Role.student, 2, 0.5, Scores(0.25), 3.0, [np.zeros((8, 8, 3), np.uint8)]), tmp_path, ORIGIN
    )
    file = tmp_path / "student_2.json"
    numbers = json.loads(file.read_text())
    del numbers["origin"]
    file.write_text(json.dumps(numbers))
    assert load_column(Role.student, 2, tmp_path, ORIGIN) is None
