"""Whole trajectories of prompts: drawn on the fly, cached, read back; what a run makes of them."""

import io
import itertools
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sprint.base.errors import SprintError
from sprint.base.random import step_generator
from sprint.data.batch import Prompt, flat
from sprint.data.batching import collate
from sprint.data.cache.items import CACHE, CachedItems
from sprint.data.encode.draws import TeacherDraws, own_teacher
from sprint.data.encode.make import make_cache
from sprint.data.encode.traces import TeacherTraces
from sprint.data.items import BadSample
from sprint.data.source import open_source
from sprint.doctor.data import examine_recipe_data
from sprint.maths.schedule import teacher_times
from sprint.maths.trigflow import HALF_PI, SIGMA_DATA
from sprint.models.families import load_family
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Data, DataKind
from sprint.train.inputs import Inputs
from tests.tolerance import assert_close, of_network, rounding

pytest_plugins = "tests.cli.fixtures"

LINES = ["a red circle", "two blue squares", "a dot", "a green cross above a triangle", "a circle"]
PROMPTS = [Prompt(caption, position) for position, caption in enumerate(LINES)]
SCALES = (1.5, 2.0, 3.0)
STEPS = 3
TRACED = (
    *("data.size=32", "data.seed=5", "distill.trajectories.states=2", f"distill.trajectories.steps={STEPS}"),
    *("distill.guidance_scales=[1.5,2,3]", "distill.adversarial.weight=0"),
)
BF16 = rounding(torch.bfloat16)


@pytest.fixture(scope="module")
def changes(tmp_path_factory) -> list[str]:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(LINES) + "\n")
    return ["data.kind=prompts", f"data.path={file}", *TRACED]


@pytest.fixture(scope="module")
def traced_recipe(recipe, changes):
    return load_recipe(recipe, changes)


@pytest.fixture(scope="module")
def traces(traced_recipe):
    family = load_family(traced_recipe.teacher, 80, False)
    return TeacherTraces(own_teacher(traced_recipe, family), traced_recipe)


@pytest.fixture(scope="module")
def online(traces):
    return traces.batch_of(PROMPTS)


@pytest.fixture(scope="module")
def of_teacher(traces) -> float:
    """Rounding of the guided teacher (w ≤ 3) behind its text encoder, along all steps."""
    return STEPS * (2 * 3 + 1) * of_network(traces.teacher.view, traces.teacher.family.text_encoder)


@pytest.fixture(scope="module")
def whole(traced_recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("traced") / "cache"
    make_cache(traced_recipe, folder, shard_size=2, trajectories=True)
    return folder


def data_of(folder: Path) -> Data:
    return Data(kind=DataKind.cache, path=str(folder), size=32, seed=5)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


# ---- on the fly ---------------------------------------------------------------------------------------


def test_a_trajectory_goes_from_its_noise_to_what_the_teacher_draws(traces, online, of_teacher):
    path = online.trajectory
    assert path.states.shape == path.velocity.shape == (5, STEPS, 4, 8, 8) and online.latent.shape == (
        5,
        4,
        8,
        8,
    )
    assert torch.equal(path.t, torch.tensor(teacher_times(STEPS)[:-1]).expand(5, -1))
    assert path.t[0, 0] == torch.tensor(HALF_PI)
    for place, prompt in enumerate(PROMPTS):
        seed = step_generator(5, "prompts", prompt.position).initial_seed()
        scale = path.guidance[place].item()
        drawn = traces.teacher.latents([prompt.caption], [seed], STEPS, scale, 32)[0]
        assert_close(online.latent[place], drawn, of_teacher)
        noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(path.states[place, 0], SIGMA_DATA * noise)


def test_each_state_leads_to_the_next_by_its_velocity(online):
    """x_s = cos(t − s)·x_t − sin(t − s)·D, all that a step of the teacher is."""
    path, times = online.trajectory, teacher_times(STEPS)
    after = torch.cat([path.states[:, 1:], SIGMA_DATA * online.latent[:, None]], 1)
    dt = torch.tensor([now - later for now, later in itertools.pairwise(times)])
    dt = dt[:, None, None, None]
    assert_close(
        torch.cos(dt) * path.states - torch.sin(dt) * path.velocity, after, rounding(torch.float32, steps=10)
    )


def test_scales_are_of_seed_and_position(traces, traced_recipe, online):
    assert {*online.trajectory.guidance.tolist()} <= {*SCALES}
    assert torch.equal(traces.batch_of(PROMPTS[::-1]).trajectory.guidance, online.trajectory.guidance.flip(0))
    many = traces._guidance([Prompt("", position) for position in range(300)])
    assert all(60 < (many == scale).sum() < 140 for scale in SCALES)
    traced_recipe.data.seed = 6
    assert not torch.equal(traces._guidance([Prompt("", position) for position in range(300)]), many)
    traced_recipe.data.seed = 5


def test_a_trajectory_is_its_own(traces, traced_recipe, online, of_teacher):
    """Not of its batch nor of how many are drawn at once."""
    traced_recipe.micro_batch_size = 2
    for batch, expected in (
        (traces.batch_of(PROMPTS), slice(None)),
        (traces.batch_of(PROMPTS[3:]), slice(3, None)),
    ):
        for name, tensor in flat(batch.trajectory).items():
            assert_close(tensor, flat(online.trajectory)[name][expected], of_teacher)
        assert_close(batch.latent, online.latent[expected], of_teacher)
    traced_recipe.micro_batch_size = 0


def test_captions_of_pictures_are_prompts_too(traced_recipe):
    scenes = open_source(Data(size=64))
    prompted = scenes.prompted().samples(range(3, 6))
    assert [p.caption for p in prompted] == [s.caption for s in scenes.samples(range(3, 6))]
    assert [p.position for p in prompted] == [3, 4, 5]
    source = open_source(traced_recipe.data)
    assert source.prompted().samples(range(8)) == source.samples(range(8))


# ---- cached -------------------------------------------------------------------------------------------


def test_what_is_cached_is_what_was_drawn_but_for_bf16(whole, traces, online, of_teacher):
    items = CachedItems(data_of(whole))
    settings = items.settings
    assert (
        settings.times == teacher_times(STEPS) and settings.guidance == [*SCALES] and items.in_order is False
    )
    source = open_source(data_of(whole))
    samples = source.samples(range(5))
    cached = collate(samples, "cpu", max_length=80)
    drawn = traces.batch_of(open_source(traces.recipe.data).samples(range(5)))
    tolerance = of_teacher + BF16
    assert samples[0].trajectory.states.dtype == samples[0].latent.dtype == torch.bfloat16
    assert_close(cached.latent, drawn.latent, tolerance)
    for name, tensor in flat(cached.trajectory).items():
        exact = name in ("t", "guidance")
        assert_close(tensor, flat(drawn.trajectory)[name], 0 if exact else tolerance)
    assert not torch.equal(cached.trajectory.states, drawn.trajectory.states)


def test_an_interrupted_cache_of_trajectories_goes_on(whole, traced_recipe, tmp_path, monkeypatch):
    folder, asked = shutil.copytree(whole, tmp_path / "cache"), []
    for name in (CACHE, "000001.tar"):
        (folder / name).unlink()
    (folder / "unfinished.json").write_text(
        json.dumps({"settings": json.loads((whole / CACHE).read_text())["settings"]})
    )
    batch_of = TeacherTraces.batch_of
    monkeypatch.setattr(
        TeacherTraces, "batch_of", lambda self, prompts: asked.extend(prompts) or batch_of(self, prompts)
    )
    line = make_cache(traced_recipe, folder, shard_size=2, trajectories=True)
    assert "kept 2 shards by size" in line and [prompt.position for prompt in asked] == [2, 3]
    assert contents(folder) == contents(whole)


def test_processes_share_a_cache_of_trajectories(whole, traced_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, words in ((1, "1 of 3 shards"), (0, "5 samples in 3 shards")):
        monkeypatch.setenv("RANK", str(rank))
        assert words in make_cache(traced_recipe, tmp_path / "cache", shard_size=2, trajectories=True)
    assert contents(tmp_path / "cache") == contents(whole)


def test_a_damaged_shard_of_trajectories_is_named(sprint, recipe, changes, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "cache")
    assert sprint("cache", recipe, *changes, "-o", folder, "--verify").code == 0
    content = bytearray((folder / "000001.tar").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "000001.tar").write_bytes(content)
    result = sprint("cache", recipe, *changes, "-o", folder, "--verify")
    assert result.code == 2 and f"{folder}/000001.tar: damaged" in result.last_line


def poison(tensors):
    tensors["velocity"][1, 2, 3, 4] = float("nan")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (poison, "NaN latent"),
        (lambda tensors: tensors.pop("states"), "wrong size"),
        (lambda tensors: tensors.update(t=tensors["t"][:2].clone()), "wrong size"),
        (lambda tensors: tensors.update(velocity=tensors["velocity"][:, :, :4].clone()), "wrong size"),
        (lambda tensors: tensors.update(guidance=torch.tensor(2)), "unreadable latent"),
    ],
)
def test_a_broken_trajectory_is_a_bad_sample(whole, tmp_path, harm, reason):
    folder = shutil.copytree(whole, tmp_path / "cache")
    edit(folder / "000000.tar", harm)
    content = json.loads((folder / CACHE).read_text())
    for file in content["files"]:
        file["bytes"] = (folder / file["name"]).stat().st_size
    (folder / CACHE).write_text(json.dumps(content))
    items = CachedItems(data_of(folder))
    with pytest.raises(BadSample) as bad:
        items.item(0, None)
    assert bad.value.reason == reason
    assert items.item(1, None).trajectory is not None


def edit(tar: Path, harm) -> None:
    """Rewrite the first sample's tensors."""
    with tarfile.open(tar) as opened:
        entries = [(entry, opened.extractfile(entry).read()) for entry in opened]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as opened:
        for entry, content in entries:
            if entry.name == "000000000.safetensors":
                tensors = safetensors.torch.load(content)
                harm(tensors)
                content = safetensors.torch.save(tensors)
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))


# ---- a run --------------------------------------------------------------------------------------------

STAGE_2 = ("distill.regression=1", "distill.batch_size=4", "distill.steps=4")


def losses_of(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("stage") == "distill"]


@pytest.mark.slow
def test_runs_from_prompts_and_from_their_cache_log_the_same(sprint, here, recipe, changes, whole):
    """But for bf16; the cache's run loads neither an encoder nor a teacher for stage 2."""
    stage_2 = [*STAGE_2, "adapt.steps=0", "log_every=1"]
    assert sprint("distill", recipe, *changes, *stage_2, "name=online").code == 0
    cached = ["data.kind=cache", f"data.path={whole}"]
    assert sprint("distill", recipe, *TRACED, *cached, *stage_2, "name=cached").code == 0
    online, stored = (losses_of(here / "runs" / name) for name in ("online", "cached"))
    assert len(online) == len(stored) == 4
    for mine, theirs in zip(online, stored, strict=True):
        for name in ("loss_end", "loss_scm"):
            assert theirs[name] == pytest.approx(mine[name], rel=0, abs=0.05 * max(1.0, abs(mine[name])))


@pytest.mark.slow
def test_scenes_give_their_captions(sprint, here, recipe):
    path = [
        "distill.trajectories.states=2",
        "distill.trajectories.steps=2",
        *STAGE_2,
        "distill.adversarial.weight=0",
    ]
    argv = [recipe, "--count", "6", "--trajectories", "--guidance", "1.5,2", *path[1:2]]
    assert sprint("cache", *argv, "-o", "traced").code == 0
    scales, cached = "distill.guidance_scales=[1.5,2]", ["data.kind=cache", "data.path=traced"]
    assert sprint("distill", recipe, *path, scales, *cached, "name=cached").code == 0
    assert sprint("distill", recipe, *path, scales, "name=online").code == 0
    assert [line["phase"] for line in losses_of(here / "runs" / "online")] == ["G"] * len(
        losses_of(here / "runs" / "cached")
    )


def test_a_look_at_a_cache_tells_of_trajectories(traced_recipe, whole):
    recipe = replace(traced_recipe, data=data_of(whole))
    (found, *_) = examine_recipe_data(recipe)
    assert "5 samples with the teacher's trajectories, 5 looked at" in found.what
    distill = replace(recipe.distill, guidance_scales=(4.5,))
    (found,) = examine_recipe_data(replace(recipe, distill=distill))
    assert "other trajectories than the recipe's: distill.guidance_scales = [4.5]" in found.what


@pytest.mark.parametrize("other", [False, True])
def test_trajectories_of_another_teacher_are_told(traced_recipe, whole, tmp_path, engine, caplog, other):
    made = tmp_path / "cache"
    shutil.copytree(whole, made)
    if other:
        content = json.loads((made / CACHE).read_text())
        content["settings"]["weights"]["teacher"] = "0" * 64
        (made / CACHE).write_text(json.dumps(content))
    recipe = replace(traced_recipe, data=data_of(made))
    assert Inputs(recipe, tmp_path / "run", engine).latent_shape == (4, 8, 8)
    assert ("trajectories of another teacher than" in caplog.text) is other


@pytest.mark.parametrize("steps", [0, 1])
def test_only_what_a_stage_reads_is_tried(traced_recipe, tmp_path, engine, monkeypatch, steps):
    drawn: list[str] = []
    for kind in (TeacherDraws, TeacherTraces):
        of_kind = kind.batch_of
        monkeypatch.setattr(
            kind,
            "batch_of",
            lambda self, *given, f=of_kind: drawn.append(type(self).__name__) or f(self, *given),
        )
    Inputs(replace(traced_recipe, adapt=replace(traced_recipe.adapt, steps=steps)), tmp_path, engine)
    assert drawn == ["TeacherDraws"] * steps + ["TeacherTraces"]


# ---- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["cache", "tiny", "--guidance", "2"], "--guidance belongs to --trajectories"),
        (
            ["cache", "tiny", "--trajectories", "--guidance", "two"],
            "--guidance two: write numbers with commas",
        ),
        (
            ["cache", "tiny", "--trajectories", "--guidance", "-1"],
            "distill.guidance_scales = [-1.0], but it takes",
        ),
        (["cache", "tiny", "--trajectories"], "scenes never end; say how many to cache with --count"),
        (
            ["distill", "tiny", "distill.regression=1"],
            "distill.trajectories.states is 0; set that to 1 or more",
        ),
        (
            ["distill", "tiny", "distill.trajectories.states=21"],
            "distill.trajectories.states = 21, but a trajectory",
        ),
        (["distill", "tiny", "distill.trajectories.states=5"], "distill.batch_size = 32 is no multiple of"),
        (
            ["distill", "tiny", "distill.trajectories.states=16"],
            "takes 2 trajectories, which do not divide over 1",
        ),
        (
            ["distill", "tiny", "distill.trajectories.max_time_probability=0.1"],
            "distill.trajectories.max_time_probability is set, and nothing reads it",
        ),
    ],
)
def test_refused_in_one_line(refusal, here, argv, words):
    assert words in refusal(*argv)


def test_a_cache_that_does_not_fit_the_recipe_says_what_differs(
    refusal, here, recipe, changes, whole, tmp_path_factory
):
    cached = [*TRACED, "data.kind=cache", f"data.path={whole}", *STAGE_2]
    line = refusal(
        "distill", recipe, *cached, "distill.guidance_scales=[1.5,4.5]", "distill.trajectories.steps=5"
    )
    assert (
        f"{whole}: other trajectories than the recipe's: distill.guidance_scales = [1.5, 4.5], there [1.5, 2.0, 3.0], "
        "distill.trajectories.steps = 5, there 3; set what is there" in line
    )
    plain = tmp_path_factory.mktemp("plain") / "cache"
    make_cache(load_recipe(recipe, changes), plain)
    line = refusal("distill", recipe, *TRACED, "data.kind=cache", f"data.path={plain}", *STAGE_2)
    assert "it holds latents alone, but distill.trajectories.states = 2; make another cache with" in line
    with pytest.raises(
        SprintError, match=r"holds a cache of other settings: .*guidance = .*, there \[\], times"
    ):
        make_cache(load_recipe(recipe, changes), plain, trajectories=True)
