"""GenEval's prompts as read from a file, and pictures judged with random networks."""

import json

import numpy as np
import pytest
from huggingface_hub import constants

from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.metrics.geneval import METADATA, GenEval, Task, read_metadata
from sprint.evaluate.metrics.geneval_rules import CLASSES, COLORS, Requirement
from tests.evaluate.metrics.test_clip import save_mini_clip
from tests.evaluate.metrics.test_geneval_models import picture, save_mini_detector

# ---- the prompts --------------------------------------------------------------------------------------

LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "tv remote", "count": 2}],
        "exclude": [{"class": "tv remote", "count": 3}],
        "prompt": "a photo of two tv remotes",
    },
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cat left of a dog",
    },
    {
        "tag": "colors",
        "include": [{"class": "car", "count": 1, "color": "red"}],
        "prompt": "a photo of a red car",
    },
]


def write(folder, *lines):
    file = folder / METADATA
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return file


def test_every_kind_of_prompt_is_read(tmp_path):
    expected = [
        Task("single_object", "a photo of a bench", (Requirement("bench", 1),)),
        Task(
            "counting",
            "a photo of two tv remotes",
            (Requirement("tv remote", 2),),
            (Requirement("tv remote", 3),),
        ),
        Task(
            "position",
            "a photo of a cat left of a dog",
            (Requirement("dog", 1), Requirement("cat", 1, position=("left of", 0))),
        ),
        Task("colors", "a photo of a red car", (Requirement("car", 1, "red"),)),
    ]
    file = write(tmp_path, *LINES)
    assert read_metadata(file) == read_metadata(tmp_path) == expected
    assert len(set(expected)) == len(expected)  # a task can be a key


CAT = {"class": "cat", "count": 1}


def but(**changes):
    return {"tag": "position", "include": [CAT, CAT], "prompt": "a photo"} | changes


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "the line: []; expected an object in braces"),
        ({"tag": "counting", "include": [CAT]}, "the line has no 'prompt'"),
        (but(seed=1), "the line has 'seed', which GenEval's rules do not know"),
        (but(tag="colours"), "tag: 'colours'; expected one of single_object, two_object"),
        (but(tag=["colors"]), "tag: ['colors']; expected one of"),
        (but(prompt=" "), "prompt: ' '; expected words"),
        (but(include=[]), "include: []; expected a list"),
        (but(include=CAT), "include: {'class': 'cat', 'count': 1}; expected a list"),
        (but(include=[CAT, {"class": "cat"}]), "include[1] has no 'count'"),
        (but(include=[{"class": "mouse", "count": 1}]), "include[0].class: 'mouse'; expected one of person"),
        (but(include=[CAT | {"count": 0}]), "include[0].count: 0; expected a whole number from 1"),
        (but(include=[CAT | {"count": True}]), "include[0].count: True"),
        (but(include=[CAT | {"count": 1.0}]), "include[0].count: 1.0"),
        (but(include=[CAT | {"color": "grey"}]), "include[0].color: 'grey'; expected one of red"),
        (but(include=[CAT | {"size": 2}]), "include[0] has 'size'"),
        (but(exclude=[CAT | {"color": "red"}]), "exclude[0] has 'color'"),
        (but(exclude=[]), "exclude: []; expected a list"),
        (
            but(include=[CAT, CAT | {"position": "above"}]),
            "include[1].position: 'above'; expected [relation, ",
        ),
        (
            but(include=[CAT, CAT | {"position": ["over", 0]}]),
            "include[1].position: 'over'; expected one of left of",
        ),
        (
            but(include=[CAT, CAT | {"position": ["above", 1]}]),
            "include[1].position: 1; expected the index of an ear",
        ),
        (
            but(include=[CAT, CAT | {"position": ["above", -1]}]),
            "include[1].position: -1; expected the index",
        ),
        (but(include=[CAT | {"position": ["above", 0]}]), "include[0].position: 0; expected the index"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, problem):
    file = write(tmp_path, LINES[0], line, LINES[1])
    with pytest.raises(SprintError) as error:
        read_metadata(file)
    assert str(error.value).startswith(f"{file}:2: {problem}")
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"")
    with pytest.raises(SprintError, match=r"x\.jsonl: empty"):
        read_metadata(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SprintError, match=r"x\.jsonl: cannot be read as text"):
        read_metadata(file)


@pytest.mark.parametrize("source", ["nowhere/evaluation_metadata.jsonl", "nowhere", "some/where:file.txt"])
def test_prompts_that_are_not_here_can_be_fetched(tmp_path, monkeypatch, source):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        NotHereError, match=r"curl -O https://raw.githubusercontent.com/djghosh13/geneval/main/\S+"
    ):
        read_metadata(source)


def test_a_folder_without_the_file(tmp_path):
    with pytest.raises(NotHereError, match=METADATA):
        read_metadata(tmp_path)


def test_a_dataset_on_the_hub(tmp_path, monkeypatch):
    file = write(tmp_path, *LINES)
    asked = []

    def download(dataset, name, repo_type):
        asked.append((dataset, name, repo_type))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert len(read_metadata("some/where")) == len(read_metadata("some/where:data/x.jsonl")) == 4
    assert asked == [("some/where", METADATA, "dataset"), ("some/where", "data/x.jsonl", "dataset")]


# ---- pictures -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a detector and a CLIP."""
    detector, clip = (tmp_path_factory.mktemp(name) for name in ("detector", "clip"))
    return str(save_mini_detector(detector)), str(save_mini_clip(clip))


@pytest.fixture(scope="module")
def geneval(folders):
    return GenEval(*folders)


def test_pictures_are_judged_by_what_is_found_in_them(geneval):
    shown = picture(size=(64, 64))
    seen = geneval.detect(shown)
    name, absent = next(iter(seen)), next(c for c in CLASSES if c not in seen)
    best = max(seen[name], key=lambda d: d.score)
    color = geneval.name_colors(shown, name, [best])[0]
    other = next(c for c in COLORS if c != color)
    tasks = [
        Task("colors", "", (Requirement(absent, 1),)),
        Task("colors", "", (Requirement(name, 1, color),)),
        Task("colors", "", (Requirement(name, 1, other),)),
    ]
    verdicts = geneval(np.stack([shown] * len(tasks)), tasks)
    assert [v.correct for v in verdicts] == [False, True, False]
    assert verdicts[0].reason == f"expected {absent}>=1, found 0"
    assert verdicts[2].reason == f"expected {other} {name}>=1, found 0 {other}; and 1 {color}"


def test_each_picture_is_uint8_and_has_a_task(geneval):
    task = Task("single_object", "", (Requirement("cat", 1),))
    with pytest.raises(SprintError, match="2 pictures but 1 tasks"):
        geneval(np.stack([picture()] * 2), [task])
    for wrong in (picture()[None] / 255, picture(), picture()[None, ..., :1]):
        with pytest.raises(SprintError, match=r"uint8 \[B, H, W, 3\]"):
            geneval(wrong, [task] * len(wrong))


def test_the_protocol_names_the_networks(geneval, folders):
    assert all(folder in geneval.protocol for folder in folders)


def test_offline_one_line_names_both_networks(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotHereError) as error:
        GenEval("nobody/no-detector", "nobody/no-clip")
    line = str(error.value)
    assert (
        "hf download nobody/no-detector" in line and "hf download nobody/no-clip" in line and "\n" not in line
    )
