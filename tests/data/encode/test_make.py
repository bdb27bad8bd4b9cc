"""`sprint cache`: whole, resumed, shared by processes, refused; and what it says."""

import fcntl
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sprint.base.errors import SprintError
from sprint.base.locks import locked
from sprint.cli.main import build_parser
from sprint.data.batching import collate, encode
from sprint.data.cache.items import CACHE, UNFINISHED, CachedItems
from sprint.data.cache.shards import folder_lock, read_record
from sprint.data.encode import make as caching
from sprint.data.source import open_source
from sprint.lab.scenes import render, scene
from sprint.lab.series import TRAINING_SEEDS
from sprint.models.families import load_family
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Data, DataKind
from tests.tolerance import assert_close, of_network

pytest_plugins = "tests.cli.fixtures"

SCENES = ("--count", "7", "--shard-size", "2", "--dtype", "fp32")


def contents(folder: Path) -> dict[str, bytes]:
    """What a cache consists of."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """Seven scenes in four shards, made at once."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    caching.make_cache(load_recipe(recipe), folder, count=7, shard_size=2, dtype="fp32")
    return folder


# ---- making -------------------------------------------------------------------------------------------


def test_scenes_are_cached_and_played_in_order(sprint, here, recipe, whole):
    code, out, err = sprint("cache", recipe, *SCENES)
    assert code == 0, err
    assert out == (
        f"caches/mini: 7 samples in 4 shards, {sum(f.stat().st_size for f in files_of(here)) / 1e6:.1f} MB\n"
        "train from it with data.kind=cache data.path=caches/mini\n"
    )
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert lines and all(line.startswith("cache") for line in lines), err
    assert contents(here / "caches" / "mini") == contents(whole)
    data = Data(kind=DataKind.cache, path="caches/mini", size=64)
    assert CachedItems(data).in_order
    settings = load_recipe(recipe)
    family = load_family(settings.teacher, 80, False)
    online = encode(open_source(settings.data).samples(range(7)), family)
    for first in (0, 7):  # after the last one it begins again
        cached = collate(open_source(data).samples(range(first, first + 7)), "cpu", max_length=80)
        assert_close(cached.latent, online.latent, of_network(family.autoencoder.encoder))


def files_of(here: Path) -> list[Path]:
    folder = here / "caches" / "mini"
    return [*folder.glob("*.tar"), *folder.glob("*.safetensors")]


def test_an_interrupted_cache_goes_on_and_comes_out_the_same(sprint, here, recipe, whole, monkeypatch):
    read, asked = caching._Scenes.item, []

    def interrupted(self, index, draw):
        asked.append(index)
        if asked.count(6) == 1 and index == 6:
            raise KeyboardInterrupt
        return read(self, index, draw)

    monkeypatch.setattr(caching._Scenes, "item", interrupted)
    code, _, err = sprint("cache", recipe, *SCENES)
    assert code == 130 and "the same command goes on from there" in err
    folder = here / "caches" / "mini"
    names = sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
    assert names == sorted([*(f"00000{n}.{end}" for n in range(3) for end in ("tar", "json")), UNFINISHED])
    with pytest.raises(SprintError, match="unfinished: 3 of 4 shards; run the same `sprint cache` to go on"):
        CachedItems(Data(kind=DataKind.cache, path=str(folder), size=64))
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    asked.clear()
    asked.append(6)
    code, out, _ = sprint("cache", recipe, *SCENES)
    assert code == 0 and " MB; kept 3 shards by size; --verify compares hashes\n" in out
    assert asked == [6, 6] and len(kept) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("harm", [lambda tar: tar.unlink(), lambda tar: tar.write_bytes(b"short")])
def test_a_shard_that_is_not_whole_is_made_anew(sprint, here, recipe, whole, harm):
    folder = shutil.copytree(whole, here / "caches" / "mini")
    others = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar") if path.name != "000001.tar"}
    harm(folder / "000001.tar")
    assert sprint("cache", recipe, *SCENES).code == 0
    assert contents(folder) == contents(whole)
    assert others == {path: path.stat().st_mtime_ns for path in others}


def test_processes_share_the_work_and_the_last_one_finishes(recipe, whole, tmp_path, monkeypatch):
    def process(rank: int) -> str:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        return caching.make_cache(load_recipe(recipe), folder, 7, 2, "fp32")

    folder = tmp_path / "cache"
    assert process(2) == f"{folder}: 1 of 4 shards; the others are other processes' work"
    assert process(0).startswith(f"{folder}: 3 of 4 shards; ")
    made = {path.name for path in folder.glob("*.tar")}
    assert made == {"000000.tar", "000002.tar", "000003.tar"}
    assert process(1).startswith(f"{folder}: 7 samples in 4 shards, 0.1 MB\n")
    assert contents(folder) == contents(whole)


def test_verify_reads_back_and_names_the_damaged_file(sprint, recipe, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "cache")
    argv = "cache", recipe, "-o", folder, "--verify"
    code, out, _ = sprint(*argv)
    assert (code, out) == (0, f"{folder}: 9 files as they were written\n")
    record = folder / "000001.json"
    record.write_bytes(record.read_bytes().replace(b'"first": 2', b'"first": 3'))
    result = sprint(*argv)
    assert result.code == 2 and result.last_line.startswith(f"sprint: {record}: damaged")
    for name in ("000002.tar", "000003.tar"):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
    result = sprint(*argv)
    assert result.code == 2 and result.last_line.startswith(f"sprint: {folder}/000002.tar: damaged")
    code, out, _ = sprint("cache", recipe, *SCENES, "-o", folder)  # which compares sizes, and says so
    assert code == 0 and "kept 4 shards by size; --verify compares hashes" in out
    assert sprint(*argv).code == 2


# ---- bad samples --------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(6):
        drawn = scene(TRAINING_SEEDS[0], k)
        Image.fromarray(render(drawn.things)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(drawn.caption)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "4.txt").write_text("  ")
    return folder


def test_bad_samples_are_skipped_counted_and_listed(sprint, here, recipe, pictures):
    argv = "cache", recipe, "data.kind=folder", f"data.path={pictures}", "--shard-size", "3"
    code, out, _ = sprint(*argv, "data.bad_share=0.5")
    listed = here / "caches" / "mini" / "bad.jsonl"
    words = "skipped 2 (1 unreadable picture, 1 empty caption)"
    assert code == 0 and "4 samples in 2 shards" in out and f"{words}, see caches/mini/bad.jsonl" in out
    reasons = {
        json.loads(line)["reason"]: json.loads(line)["where"] for line in listed.read_text().splitlines()
    }
    assert reasons == {
        "unreadable picture": str(pictures / "1.png"),
        "empty caption": str(pictures / "4.txt"),
    }
    assert [read_record(listed.parent, n).skipped[0].index for n in range(2)] == [1, 4]
    items = CachedItems(Data(kind=DataKind.cache, path=str(listed.parent), size=64))
    keys = [items.size(k) and items._tar.key(k) for k in range(len(items))]
    assert keys == [f"{k:09d}" for k in (0, 2, 3, 5)]
    assert json.loads((listed.parent / CACHE).read_text())["skipped"] == {
        "unreadable picture": 1,
        "empty caption": 1,
    }


def test_too_many_bad_samples_stop_it(sprint, here, recipe, pictures):
    """Also when it is run again, where each run alone meets too few to judge by."""
    argv = "cache", recipe, "data.kind=folder", f"data.path={pictures}", "--shard-size", "3"
    for run in range(2):
        result = sprint(*argv)
        assert ("1 samples stay skipped; to try them again, delete the cache" in result.err) == (run > 0)
        assert (
            result.code == 2 and "2 of 6 samples tried are bad, more than data.bad_share = 0.01" in result.err
        )
        folder = here / "caches" / "mini"
        assert (folder / "000000.tar").exists() and not (folder / CACHE).exists()
    assert sprint(*argv, "data.bad_share=0.5").code == 0
    assert sprint(*argv).code == 2


def test_too_many_bad_samples_of_all_processes_stop_the_last(recipe, pictures, tmp_path, monkeypatch):
    """Each meets one in three samples of six, too few to judge by."""
    folder, changes = tmp_path / "cache", ["data.kind=folder", f"data.path={pictures}"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert caching.make_cache(load_recipe(recipe, changes), folder, shard_size=3).count("1 of 2 shards")
    monkeypatch.setenv("RANK", "1")
    words = (
        r"2 of 6 samples are bad \(1 unreadable picture, 1 empty caption\), more than .* see .*/bad\.jsonl"
    )
    with pytest.raises(SprintError, match=words):
        caching.make_cache(load_recipe(recipe, changes), folder, shard_size=3)
    assert not (folder / CACHE).exists()
    line = caching.make_cache(load_recipe(recipe, [*changes, "data.bad_share=0.4"]), folder, shard_size=3)
    assert "4 samples in 2 shards" in line


def test_a_latent_that_is_not_finite_is_bad(recipe, tmp_path, monkeypatch):
    encode_all = caching.Encoder.__call__

    def poisoned(self, items):
        encoded = encode_all(self, items)
        encoded[-1].latent[0, 0, 0] = float("nan")
        return encoded

    monkeypatch.setattr(caching.Encoder, "__call__", poisoned)
    settings = load_recipe(recipe, ["data.bad_share=0.5"])
    line = caching.make_cache(settings, tmp_path / "cache", 5)
    assert "4 samples in 1 shards" in line and "skipped 1 (1 NaN latent)" in line


def test_pictures_of_several_shapes_keep_their_own(recipe, tmp_path):
    """Aspect buckets: one shard, several shapes, each picture's latent its own."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, shape in enumerate([(64, 64), (64, 128), (64, 64), (128, 64)]):
        noise = np.random.default_rng(k).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"noise {k}")
    changes = ["data.kind=folder", f"data.path={folder}", "data.aspect_buckets=true"]
    settings = load_recipe(recipe, changes)
    caching.make_cache(settings, tmp_path / "cache", dtype="fp32")
    cached = replace(settings.data, kind=DataKind.cache, path=str(tmp_path / "cache"))
    items, family = CachedItems(cached), load_family(settings.teacher, 80, False)
    shapes = set()
    for index in range(4):
        sample = caching.open_items(settings.data).item(index, np.random.default_rng(0))
        online = encode([sample], family)
        encoded = items.item(index, np.random.default_rng(0))
        assert_close(encoded.latent, online.latent[0], of_network(family.autoencoder.encoder))
        assert items.size(index) == sample.picture.shape[:2]
        shapes.add(items.size(index))
    assert len(shapes) == 3


# ---- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["data.seed=1"], "data.seed = 1, there 0"),
        (["text.max_length=40"], "text.max_length = 40, there 80"),
        (["--shard-size", "3"], "shard_size = 3, there 2"),
        (["--dtype", "bf16"], "dtype = bf16, there fp32"),
        (["--count", "8"], "samples = 8, there 7"),
    ],
)
def test_a_folder_keeps_one_cache_s_settings(sprint, here, recipe, whole, argv, words):
    folder = shutil.copytree(whole, here / "caches" / "mini")
    if "8" in argv:  # an unfinished one too
        (folder / CACHE).replace(folder / UNFINISHED)
    before = contents(folder)
    result = sprint("cache", recipe, *SCENES, *argv)
    assert result.code == 2 and f"holds a cache of other settings: {words}; " in result.last_line
    assert contents(folder) == before


def test_the_same_data_by_another_path_is_the_same_cache(sprint, here, recipe):
    (here / "prompts.txt").write_text("a dot\na red circle\n")
    argv = "cache", recipe, "--from-prompts", "data.size=16", "data.teacher_steps=1", "-o", "cache"
    assert sprint(*argv, "data.path=prompts.txt").code == 0
    code, out, _ = sprint(*argv, "data.path=./prompts.txt", "data.bad_share=0.5", "data.workers=2")
    assert code == 0 and "kept 1 shards" in out
    (here / "other.txt").write_text("a dot\na red circle\n")
    result = sprint(*argv, "data.path=other.txt")
    assert f"data.path = {here}/other.txt, there {here}/prompts.txt" in result.last_line


@pytest.mark.parametrize(
    ("kind", "path", "keys"),
    [
        ("folder", "pictures", {"caption_temperature"}),
        ("huggingface", "someone/pictures", {"caption_temperature", "image_column", "caption_column"}),
        ("prompts", "prompts.txt", {"teacher_steps", "guidance_scale"}),
        ("scenes", "", set()),
    ],
)
def test_what_makes_another_cache_is_what_the_kind_reads(here, kind, path, keys):
    decides = caching._what_decides(Data(kind=DataKind(kind), path=path))
    on_disk = kind in ("folder", "prompts")
    assert decides["path"] == (str(here / path) if on_disk else path)
    assert decides.keys() == {"kind", "path", "size", "aspect_buckets", "seed"} | keys


def interrupted_at_once(sprint, monkeypatch, *argv) -> None:
    """Begin a cache and leave it without a shard."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(caching, "write_shard", interrupted)
        assert sprint(*argv).code == 130


def test_a_cache_without_a_shard_gives_way_to_another(sprint, here, recipe, whole, monkeypatch):
    folder = here / "caches" / "mini"
    interrupted_at_once(sprint, monkeypatch, "cache", recipe, *SCENES, "data.seed=1")
    assert contents(folder).keys() == {UNFINISHED}
    with open(folder / ".lock-1", "a") as lock:  # a second process is at work on its first shard
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "data.seed = 0, there 1" in sprint("cache", recipe, *SCENES).last_line
    assert sprint("cache", recipe, *SCENES).code == 0
    assert contents(folder) == contents(whole)


def test_processes_that_start_at_once_wait_for_the_one_that_begins(whole, tmp_path):
    settings, problems = CachedItems(Data(kind=DataKind.cache, path=str(whole), size=64)).settings, []

    def claim():
        try:
            with caching._claimed(tmp_path, settings, rank=1):
                pass
        except SprintError as error:
            problems.append(error)

    second = threading.Thread(target=claim)
    with locked(folder_lock(tmp_path)):
        second.start()
        second.join(0.2)
        assert second.is_alive() and not (tmp_path / UNFINISHED).exists()
        caching._take(tmp_path, settings, rank=0)
    second.join(10)
    assert not second.is_alive() and not problems


def test_a_folder_of_something_else_is_refused(sprint, here, recipe, pictures):
    result = sprint("cache", recipe, "--count", "4", "-o", pictures)
    assert result.code == 2 and "holds 0.png and no cache" in result.last_line


def test_two_caches_at_once_in_one_folder_are_refused(sprint, recipe, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    with open(folder / ".lock-0", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = sprint("cache", recipe, "--count", "4", "-o", folder)
    assert result.code == 2 and "another `sprint cache` is at work there" in result.last_line
    assert sprint("cache", recipe, "--count", "4", "-o", folder).code == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "scenes never end; say how many to cache with --count"),
        (["--count", "2", "data.aspect_buckets=true"], "scenes have no aspect to keep"),
        (["--from-prompts", "data.path=x", "data.aspect_buckets=true"], "prompts have no aspect to keep"),
        (["data.kind=cache", "data.path=x"], "data.kind = cache: that is encoded already"),
        (["--verify", "-o", "nowhere"], "nowhere: no such folder"),
        (["--from-prompts"], "data.kind = prompts needs data.path"),
    ],
)
def test_refusals_before_anything_is_made(refusal, here, recipe, argv, words):
    assert words in refusal("cache", recipe, *argv)


def test_what_cannot_be_encoded_leaves_no_folder(refusal, here, recipe, pictures):
    """The family divides pictures into cells of 4 pixels."""
    argv = "cache", recipe, "data.kind=folder", f"data.path={pictures}", "data.size=66"
    assert "takes multiples of 4 pixels" in refusal(*argv)


def test_a_file_in_the_folder_s_place_is_refused(refusal, here, recipe):
    (here / "notes").write_text("mine")
    assert "notes: a file; name a folder with -o" in refusal("cache", recipe, "--count", "2", "-o", "notes")


@pytest.mark.parametrize("option", ["--count=0", "--shard-size=-1", "--count=x"])
def test_numbers_are_at_least_one(sprint, here, recipe, option):
    result = sprint("cache", recipe, option)
    assert result.code == 2 and "give a whole number of at least 1" in result.last_line


def test_help_teaches_by_example(sprint):
    code, out, _ = sprint("cache", "--help")
    assert code == 0 and "  sprint cache " in sprint("--help").out
    examples = [line.split() for line in out.splitlines() if line.startswith("  sprint cache ")]
    assert len(examples) >= 4
    for _, *argv in examples:
        assert build_parser().parse_known_args(argv)[0].verb.__name__ == "cache"
