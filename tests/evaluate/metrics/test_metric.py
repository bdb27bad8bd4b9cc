"""What each metric looks at, and the figures it makes of it."""

import json
import math
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.choices import METERS
from sprint.evaluate.metrics import clip, geneval, registry
from sprint.evaluate.metrics import fid as distance
from sprint.evaluate.metrics import metric as metrics
from sprint.evaluate.metrics.clip import ClipScore
from sprint.evaluate.metrics.fid import FrechetDistance
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid
from sprint.evaluate.metrics.geneval import GenEvalScore, error_of_mean
from sprint.evaluate.metrics.geneval_rules import PROMPTS, Requirement, Task
from sprint.evaluate.metrics.metric import Choices, Drawn
from sprint.evaluate.metrics.pace import Pace
from sprint.evaluate.metrics.real_scenes import real_scene_features
from sprint.evaluate.metrics.scenes import SceneScore, seen_words
from sprint.evaluate.prompts import (
    Prompts,
    named_prompts,
    needed,
    no_prompts,
    reference_prompts,
    scene_prompts,
    spread,
)
from sprint.evaluate.result import Figure, Shot, share
from sprint.evaluate.store import Drawing, PictureStore, Times
from sprint.lab.reader import Seen
from sprint.lab.scenes import BACKGROUND, render, scene
from sprint.lab.series import HELD_OUT_SEED, held_out_scenes
from sprint.pages.png import write_png
from tests.tolerance import near, rounding

BLANK = np.full((64, 64, 3), BACKGROUND, np.uint8)


def choices(tmp_path, **changes) -> Choices:
    return Choices(kept=tmp_path / "kept", kept_real=tmp_path / "real", **changes)


def drawn(tmp_path, prompts: Prompts, pictures) -> Drawn:
    store = PictureStore(tmp_path / "drawn", Drawing("a" * 64, (1.5, 0.0), 4.5, 64))
    for shot, picture in zip(prompts.shots, pictures, strict=True):
        store.write(shot, picture)
    return Drawn(prompts, store, "student, 1 step")


# ---- prompts ----------------------------------------------------------------------------------------


def test_scenes_are_those_of_the_report():
    prompts = scene_prompts(7, seed=5)
    assert [s.prompt for s in prompts.shots] == [s.caption for s in held_out_scenes(7)]
    assert [s.seed for s in prompts.shots] == list(range(5, 12))
    assert "fewer than the protocol's 600" in prompts.words
    assert scene_prompts(None, 0).words == "600 built-in held-out scenes"


def test_prompts_of_a_text_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n\n a <b> dog \n")
    assert named_prompts(str(file), None, 3).shots == [Shot("a fox", 3), Shot("a <b> dog", 4)]
    assert named_prompts(str(file), 1, 0).words == "1 of 2 prompts in prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa fox\n")
    assert named_prompts(str(file), None, 0).shots == [Shot("a fox", 0)]
    file.write_text("\n")
    with pytest.raises(SprintError, match=r"^--prompts .*no prompts there"):
        named_prompts(str(file), None, 0)
    with pytest.raises(SprintError, match="no such file or folder; or say scenes"):
        named_prompts(str(tmp_path / "missing"), None, 0)


def test_prompts_of_real_pictures(tmp_path):
    entries = {"b": {"category": "art", "prompt": "a fox"}, "a": {"category": "art", "prompt": "a dog"}}
    (tmp_path / "meta_data.json").write_text(json.dumps(entries))
    (tmp_path / "imgs" / "art").mkdir(parents=True)
    for key in entries:
        (tmp_path / "imgs" / "art" / f"{key}.jpg").touch()
    found = reference_prompts(tmp_path, None, 7)
    assert found.shots == [Shot("a fox", 7), Shot("a dog", 8)]
    assert found.words == "2 prompts of MJHQ-30K, fewer than the protocol's 30000"


def test_a_reference_without_captions_asks_for_prompts(tmp_path):
    write_png(tmp_path / "a.png", BLANK)
    with pytest.raises(NotHereError, match="no captions; give --prompts FILE"):
        reference_prompts(tmp_path, None, 0)
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(NotHereError, match="statistics, which have no prompts; give --prompts FILE"):
        reference_prompts(tmp_path / "s.npz", None, 0)


def test_no_prompts_is_said_with_what_to_fetch():
    with pytest.raises(NotHereError, match="--reference FOLDER with MJHQ-30K"):
        needed(no_prompts())


def test_spread_is_even_and_whole_by_default():
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, None) == [0, 1, 2] and spread(3, 9) == [0, 1, 2]


# ---- what is told of a metric -----------------------------------------------------------------------


def test_every_metric_that_looks_at_pictures_has_a_meter():
    by_metric = {meter.metric.name for meter in METERS}
    assert by_metric == {name for name, metric in registry.METRICS.items() if metric.pictures}
    assert all(metric.title and metric.about for metric in registry.METRICS.values())


def test_a_metric_of_another_version_has_its_name_for_a_title():
    assert registry.metric_of("beauty").title == "beauty" and registry.metric_of("fid") is registry.FID


def test_categories_have_one_title_on_every_page():
    scenes, official = registry.SCENES.row, registry.GENEVAL.row
    assert [scenes(name) for name in ("scene score", "two object", "color attr")] == [
        "scene score", "two objects", "attribute binding",
    ]  # fmt: skip
    assert official("GenEval: two object") == "GenEval: two objects" and official("GenEval") == "GenEval"
    assert official("GenEval: of all pictures") == "GenEval: of all pictures"


# ---- metrics ----------------------------------------------------------------------------------------


def test_scene_score_with_a_known_answer(tmp_path):
    """Real scenes are right, blank pictures wrong: every third prompt is blank, so single objects and colours fail."""
    metric = SceneScore(choices(tmp_path, count=12), no_prompts())
    pictures = [BLANK if i % 3 == 0 else render(s.things) for i, s in enumerate(held_out_scenes(12))]
    found = metric.measure(drawn(tmp_path, metric.find(), pictures))
    assert found.figures["scene score"] == Figure(8 / 12, math.sqrt(8 / 12 * 4 / 12 / 12))
    assert {name: figure.value for name, figure in list(found.figures.items())[1:]} == {
        "single object": 0, "two object": 1, "counting": 1, "colors": 0, "position": 1, "color attr": 1,
    }  # fmt: skip
    assert found.verdicts.correct == [i % 3 != 0 for i in range(12)]
    assert found.verdicts.reasons[0] == "nothing" and found.verdicts.reasons[1] != "nothing"


def test_what_was_seen_in_words():
    seen = [Seen("circle", "red", 10.2, 20.4, 18.0), Seen(None, None, 50.0, 40.0, 9.0)]
    single, position = scene(HELD_OUT_SEED, 2).claim, scene(HELD_OUT_SEED, 4).claim
    assert single.category == "counting" and position.relation
    assert seen_words(seen, single) == "red circle; unclear scribble"
    assert seen_words(seen, position) == "red circle at 10, 20; unclear scribble at 50, 40"
    assert seen_words([], single) == "nothing"


def test_clip_score_is_the_mean_with_its_standard_error(tmp_path, monkeypatch):
    class Scorer:
        protocol = "fake"

        def __init__(self, name, device):
            self.name = name

        def __call__(self, pictures, prompts):
            return torch.tensor([float(len(prompt)) for prompt in prompts])

    monkeypatch.setattr(clip, "ClipScorer", Scorer)
    monkeypatch.setattr(metrics, "AT_ONCE", 2)
    prompts = Prompts("prompts", "3 prompts", [Shot("a", 0), Shot("bb", 1), Shot("ccc", 2)])
    metric = ClipScore(choices(tmp_path, clip_model="mine"), prompts)
    metric.open()
    found = metric.measure(drawn(tmp_path, metric.find(), [BLANK] * 3))
    assert metric.scorer.name == "mine" and metric.protocol()["network"] == "fake"
    assert found.figures == {"CLIP score": Figure(2.0, 1 / math.sqrt(3), spec=".2f")}
    assert found.verdicts.scores == [1.0, 2.0, 3.0]


def test_fid_is_zero_against_the_same_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(distance, "REFERENCE_SCENES", 12)
    monkeypatch.setattr(
        distance,
        "real_scene_features",
        lambda network, count: real_scene_features(network, count, HELD_OUT_SEED),
    )
    prompts = scene_prompts(12, 0)
    metric = FrechetDistance(choices(tmp_path), prompts)

    class Network:
        name = "mean colour"

        def __call__(self, pictures):
            return torch.from_numpy(pictures).float().mean((1, 2))

    monkeypatch.setattr(distance, "scene_features", lambda device: Network())
    metric.open()
    same = metric.measure(drawn(tmp_path, prompts, [render(s.things) for s in held_out_scenes(12)])).figures
    levels = rounding(torch.float64, terms=3**2, steps=10)  # matrices of three colours, of 255 levels each
    assert same["FID"].value == near(0, levels, scale=3 * 255**2) and not same["FID"].higher
    other = metric.measure(
        drawn(tmp_path, prompts, [255 - render(s.things) for s in held_out_scenes(12)])
    ).figures
    assert other["FID"].value > 1000 and other["KID"].value > same["KID"].value
    assert (
        metric.protocol()["network"] == "mean colour"
        and "12 other real scenes" in metric.protocol()["against"]
    )


class MeanColour:
    """Stands for Inception."""

    name = "mean colour"
    calls = 0

    def __call__(self, pictures):
        self.calls += len(pictures)
        return torch.from_numpy(pictures).float().mean((1, 2))


@pytest.fixture
def colours(monkeypatch):
    network = MeanColour()
    monkeypatch.setattr(distance, "inception", lambda weights, device: network)
    return network


@pytest.fixture
def real(tmp_path):
    """A folder of six scenes."""
    (tmp_path / "photos").mkdir()
    for i in range(6):
        write_png(tmp_path / "photos" / f"{i}.png", render(scene(1, i).things))
    return tmp_path / "photos"


def six(tmp_path):
    prompts = Prompts("prompts", "6 prompts", [Shot(str(i), i) for i in range(6)])
    return drawn(tmp_path, prompts, [render(scene(2, i).things) for i in range(6)])


def test_features_of_real_pictures_are_made_once_for_all_models(tmp_path, colours, real):
    for kept in ("one", "other"):
        pictures = six(tmp_path)
        metric = FrechetDistance(
            Choices(tmp_path / kept, tmp_path / "real", reference=real), pictures.prompts
        )
        metric.open()
        found = metric.measure(pictures).figures["FID"]
    assert colours.calls == 18  # six drawn ones twice, six real ones once
    (kept,) = (tmp_path / "real").rglob("statistics.safetensors")
    again = FrechetDistance(choices(tmp_path, reference=kept), pictures.prompts)
    again.open()
    assert again.measure(pictures).figures["FID"].value == pytest.approx(found.value)
    assert "says 256 px" in again.protocol()["resize"] and "KID" not in again.protocol()


def test_kid_of_all_pictures_has_no_spread_and_says_its_subset(tmp_path, colours, real):
    pictures = six(tmp_path)
    metric = FrechetDistance(choices(tmp_path, reference=real), pictures.prompts)
    metric.open()
    assert metric.measure(pictures).figures["KID × 1000"].error is None
    assert metric.protocol()["KID"] == "of all 6 pictures of each set"
    (real / "5.png").unlink()
    fewer = FrechetDistance(choices(tmp_path, reference=real), pictures.prompts)
    fewer.open()
    assert fewer.measure(pictures).figures["KID × 1000"].error > 0
    assert fewer.protocol()["KID"].startswith("100 subsets of 5 pictures")


def test_foreign_statistics_are_told_as_they_are(tmp_path, colours):
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    pictures = six(tmp_path)
    metric = FrechetDistance(choices(tmp_path, reference=tmp_path / "s.npz"), pictures.prompts)
    metric.open()
    measured = metric.measure(pictures).figures
    whole = GaussianStatistics()
    whole.update(torch.cat([colours(batch) for batch in pictures.batches("again")]))
    assert measured.keys() == {"FID"} and measured["FID"].value == pytest.approx(
        fid(whole, metric.reference), rel=0.2
    )
    assert metric.protocol()["resize"].startswith("ours to 256 px") and "KID" not in metric.protocol()


def test_fid_of_prompts_without_real_pictures_says_what_to_give(tmp_path):
    prompts = Prompts("prompts", "1 prompt", [Shot("a", 0)])
    with pytest.raises(NotHereError, match="give --reference"):
        FrechetDistance(choices(tmp_path), prompts).find()


def test_geneval_draws_four_of_each_and_averages_the_categories(tmp_path, monkeypatch):
    tasks = [
        {"tag": tag, "prompt": f"a photo of a {name}", "include": [{"class": name, "count": 1}]}
        for tag, name in (("single_object", "cat"), ("single_object", "dog"), ("colors", "bus"))
    ]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, tasks)))
    metric = GenEvalScore(choices(tmp_path, seed=10, geneval_metadata=str(file)), no_prompts())
    prompts = metric.find()
    assert [shot.seed for shot in prompts.shots] == list(range(10, 22))
    assert [shot.group for shot in prompts.shots] == ["single_object"] * 8 + ["colors"] * 4
    verdict = namedtuple("Verdict", "correct reason")
    metric.judge = lambda pictures, tasks: [verdict("cat" in t.prompt, f"no {t.tag}") for t in tasks]
    found = metric.measure(drawn(tmp_path, prompts, [BLANK] * 12))
    assert found.figures["GenEval: single object"] == share(4, 8)
    assert found.figures["GenEval: colors"].value == 0
    assert found.figures["GenEval: of all pictures"] == share(4, 12)
    assert found.figures["GenEval: of prompts, one right"] == share(1, 3)
    assert found.figures["GenEval"].value == 0.25
    assert found.figures["GenEval"].error == pytest.approx(math.sqrt(0.25 / 8) / 2)
    assert found.verdicts.reasons[-1] == "no colors"
    few = GenEvalScore(choices(tmp_path, count=8, geneval_metadata=str(file)), no_prompts()).find()
    assert len(few.shots) == 8 and few.words == "4 for each of 2 prompts of 3"


def test_geneval_says_whether_its_prompts_are_as_many_as_the_official_ones(tmp_path, monkeypatch):
    tasks = [
        Task(tag, f"{tag} {i}", (Requirement("cat", 1),)) for tag, n in PROMPTS.items() for i in range(n)
    ]
    monkeypatch.setattr(geneval, "read_metadata", lambda: tasks)
    said = {}
    for count in (None, 8):
        metric = GenEvalScore(choices(tmp_path, count=count), no_prompts())
        metric.judge = SimpleNamespace(protocol="networks")
        metric.find()
        said[count] = metric.protocol()["prompts"]
    assert said == {None: "official 553 × 4", 8: "not official: 2 prompts, 2 of 6 tags"}


def test_the_error_of_a_mean():
    assert error_of_mean([Figure(1.0, 0.3), Figure(0.0, 0.4)]) == 0.25


def test_pace_is_what_the_store_kept(tmp_path):
    prompts = scene_prompts(2, 0)
    metric, pictures = Pace(choices(tmp_path), prompts), drawn(tmp_path, prompts, [BLANK] * 2)
    with pytest.raises(SprintError, match="drawn without keeping times"):
        metric.measure(pictures)
    pictures.store.describe("m", Times(50, 600, 1.5))
    assert metric.measure(pictures).figures == {
        "drawing, ms a picture": Figure(2.5, higher=False, spec=".1f")
    }
    assert "in batches of at most 50" in metric.protocol()["figures"]
