"""Diversity over seeds, and FID against the teacher: known answers, and what they do not say."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.choices import chosen_metrics
from sprint.evaluate.metrics import diversity
from sprint.evaluate.metrics.diversity import (
    NEXT_SEED,
    PROMPTS,
    SEEDS,
    SeedDiversity,
    mean_distances,
    real_pictures,
    seeds_of,
)
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid
from sprint.evaluate.metrics.metric import Choices, Drawn
from sprint.evaluate.metrics.teacher_fid import TeacherDistance
from sprint.evaluate.models import STUDENT, TEACHER, Model
from sprint.evaluate.prompts import Prompts, scene_prompts
from sprint.evaluate.result import Measured, Shot
from sprint.evaluate.store import Drawing, PictureStore
from sprint.lab.features import scene_features
from sprint.lab.reader import holds
from sprint.lab.scenes import render, scene
from sprint.lab.series import held_out_scenes


def choices(tmp_path, **changes) -> Choices:
    return Choices(kept=tmp_path / "kept", kept_real=tmp_path / "real", **changes)


def drawn(folder, prompts: Prompts, pictures, teacher=None) -> Drawn:
    store = PictureStore(folder, Drawing("a" * 64, (1.5, 0.0), 4.5, 64))
    for shot, picture in zip(prompts.shots, pictures, strict=True):
        store.write(shot, picture)
    return Drawn(prompts, store, "student, 1 step", teacher)


# ---- diversity --------------------------------------------------------------------------------------


def test_some_prompts_are_drawn_with_several_seeds():
    every = scene_prompts(600, 5)
    few = seeds_of(every)
    assert len(few.shots) == PROMPTS * SEEDS and few.words == "24 prompts, 4 seeds of each"
    assert len({shot.prompt for shot in few.shots[:SEEDS]}) == 1
    assert [shot.seed for shot in few.shots[SEEDS : 2 * SEEDS]] == [6 + k * NEXT_SEED for k in range(SEEDS)]
    assert {*few.shots[::SEEDS]} <= {*every.shots}  # the first of each is drawn already
    assert [shot.group for shot in few.shots].count("counting") == len(few.shots) / 6
    text = Prompts("prompts", "", [Shot(f"prompt {i}", i) for i in range(100)])
    assert len({shot.prompt for shot in seeds_of(text).shots}) == PROMPTS
    assert seeds_of(text).shots[-1].prompt != "prompt 23"  # evenly over a set that may be sorted
    assert len(seeds_of(scene_prompts(9, 0)).shots) == 2 * SEEDS
    assert len(seeds_of(scene_prompts(2, 0)).shots) == SEEDS


def test_distances_are_those_of_all_pairs_of_a_prompt():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    assert mean_distances(points, seeds=3) == pytest.approx([(5 + 5 + 10) / 3, 0.0])
    cloud = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).double()
    by_hand = [
        np.mean([float((a - b).square().sum().sqrt()) for a, b in combinations(group, 2)])
        for group in (cloud[:4], cloud[4:])
    ]
    assert mean_distances(cloud) == pytest.approx(by_hand, rel=1e-12)


def test_one_picture_for_each_prompt_has_no_diversity_and_real_scenes_have(tmp_path, monkeypatch):
    meter = SeedDiversity(choices(tmp_path), scene_prompts(6 * SEEDS, 0))
    prompts = meter.find()
    meter.open()
    assert "real" not in meter.protocol()
    same = [render(s.things) for s in held_out_scenes(6) for _ in range(SEEDS)]
    found = meter.measure(drawn(tmp_path / "same", prompts, same)).figures["diversity over seeds"]
    assert (found.value, found.error, found.higher) == (0.0, 0.0, True)
    real = [picture for pictures in real_pictures(6) for picture in pictures]
    figure = meter.measure(drawn(tmp_path / "real", prompts, real)).figures["diversity over seeds"]
    distances = mean_distances(scene_features()(np.stack(real)))
    assert figure.value == pytest.approx(np.mean(distances)) and min(distances) > 0
    assert figure.error == pytest.approx(np.std(distances, ddof=1) / math.sqrt(6))
    assert meter.protocol()["real"] == f"real scenes of the same captions are {figure.value:.3f} apart"


def test_real_pictures_of_a_caption_show_it_and_differ():
    for one, pictures in zip(held_out_scenes(6), real_pictures(6, seeds=2), strict=True):
        assert pictures.shape == (2, 64, 64, 3) and (pictures[0] != pictures[1]).any()
        assert all(holds(picture, one.claim) for picture in pictures)


def test_pictures_of_other_models_are_compared_in_clip(tmp_path, monkeypatch):
    """Unit vectors of CLIP, here of three numbers: their mean colours."""
    prompts = Prompts("prompts", "", [Shot(f"prompt {i}", i) for i in range(8)])
    meter = SeedDiversity(choices(tmp_path), prompts)
    monkeypatch.setattr(
        meter,
        "_clip",
        lambda: (
            lambda pictures: torch.nn.functional.normalize(
                torch.from_numpy(pictures).float().mean((1, 2)), dim=1
            ),
            "CLIP",
        ),
        raising=True,
    )
    shots = meter.find()
    meter.open()
    red, green = (np.full((8, 8, 3), color, np.uint8) for color in ((200, 0, 0), (0, 100, 0)))
    pictures = [red, red, red, red, red, red, green, green]
    figure = meter.measure(drawn(tmp_path, shots, pictures)).figures["diversity over seeds"]
    assert figure.value == pytest.approx((0 + 4 * math.sqrt(2) / 6) / 2)
    assert meter.size is None and meter.protocol()["network"] == "CLIP"


def test_without_clip_or_prompts_it_is_said(tmp_path):
    other = SeedDiversity(choices(tmp_path, fetch=False), Prompts("prompts", "", [Shot("a fox", 0)]))
    with pytest.raises(NotHereError, match="no CLIP here"):
        other.open()
    with pytest.raises(NotHereError, match="no prompts"):
        SeedDiversity(choices(tmp_path), NotHereError("no prompts")).find()
    assert diversity.SET not in ("scenes", "geneval", "mjhq", "prompts")


# ---- against the teacher ----------------------------------------------------------------------------


def scenes_of(seed: int, count: int) -> list[np.ndarray]:
    return [render(scene(seed, i).things) for i in range(count)]


def test_fid_against_the_teacher_is_that_of_two_sets_of_features(tmp_path):
    prompts = scene_prompts(40, 0)
    meter = TeacherDistance(choices(tmp_path), prompts)
    meter.find()
    meter.open()
    theirs, ours = scenes_of(1, 40), scenes_of(2, 40)
    teacher = drawn(tmp_path / "teacher", prompts, theirs).store
    figures = meter.measure(drawn(tmp_path / "student", prompts, ours, teacher)).figures
    network = scene_features()
    a, b = (GaussianStatistics.of(network(np.stack(pictures))) for pictures in (ours, theirs))
    assert figures["FID against the teacher"].value == pytest.approx(fid(a, b))
    assert not figures["FID against the teacher"].higher
    equal = meter.measure(drawn(tmp_path / "equal", prompts, theirs, teacher)).figures
    assert equal["FID against the teacher"].value == pytest.approx(0, abs=1e-9)
    assert meter.measure(Drawn(prompts, teacher, "teacher, 20 steps", teacher)) == Measured({})
    assert "same prompts and seeds" in meter.protocol()["against"]


def test_a_teacher_is_needed_and_asked_for_by_name_only(tmp_path):
    prompts = scene_prompts(2, 0)
    with pytest.raises(NotHereError, match="give --teacher"):
        TeacherDistance(choices(tmp_path), prompts).measure(Drawn(prompts, None, "student, 1 step"))
    student, teacher = Model("s", STUDENT, (1,), 64), Model("t", TEACHER, (20,), 64)
    with pytest.raises(SprintError, match=r"--metrics teacher-fid: .*give --teacher"):
        chosen_metrics(["teacher-fid"], [student])
    assert "teacher-fid" not in [metric.name for metric in chosen_metrics((), [student])]
    assert "teacher-fid" in [metric.name for metric in chosen_metrics((), [student, teacher])]
