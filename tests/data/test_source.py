"""Sources by position: order, several processes, scenes, stand-ins for bad samples."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sprint.base.errors import SprintError
from sprint.data.batch import Prompt, Sample
from sprint.data.batching import batch_positions
from sprint.data.cache.items import CachedItems
from sprint.data.cache.sana import CachedReferenceItems
from sprint.data.items import BadSample, Items
from sprint.data.kinds.folder import FolderItems
from sprint.data.kinds.huggingface import HuggingFaceItems
from sprint.data.kinds.prompts import PromptItems
from sprint.data.kinds.webdataset import WebDatasetItems
from sprint.data.order import InOrder, Shuffled
from sprint.data.source import (
    LONGEST_CHAIN,
    ItemSource,
    SceneSource,
    open_items,
    open_source,
)
from sprint.lab.scenes import scene
from sprint.lab.series import HELD_OUT_SEED, TRAINING_SEEDS
from sprint.recipe.schema import Data, DataKind
from tests.data.picture_files import write_folder


class Numbers(Items):
    """Item k is the prompt "k"; those of `bad` cannot be read."""

    def __init__(self, count, bad=(), in_order=False):
        self.count, self.bad, self.in_order = count, set(bad), in_order

    def __len__(self):
        return self.count

    def item(self, index, draw):
        if index in self.bad:
            raise BadSample("NaN latent" if index % 2 else "wrong size", f"item {index}")
        return Prompt(f"{index}", int(draw.integers(10**6)))


def numbers(source, positions):
    return [int(sample.caption) for sample in source.samples(positions)]


def folder_data(path, size=8, seed=0, **settings):
    return Data(kind=DataKind.folder, path=str(path), size=size, seed=seed, **settings)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


def equal(a: list[Sample], b: list[Sample]) -> bool:
    return [s.caption for s in a] == [s.caption for s in b] and all(
        np.array_equal(x.picture, y.picture) for x, y in zip(a, b, strict=True)
    )


# Positions


@pytest.mark.parametrize("kind", ["scenes", "folder"])
def test_samples_depend_on_the_position_alone(kind, folder):
    def source():
        return SceneSource(5) if kind == "scenes" else open_source(folder_data(folder, seed=5))

    whole = source().samples(range(0, 24))
    used = source()
    used.samples(range(17, 3, -1))
    assert equal(used.samples(range(0, 24)), whole)
    assert equal(source().samples(range(9, 20)), whole[9:20])
    assert equal([source().samples(range(p, p + 1))[0] for p in range(24)], whole)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 12])
def test_any_number_of_processes_sees_the_same_batches(processes):
    for step in (0, 7):
        shares = [batch_positions(step, 12, rank, processes) for rank in range(processes)]
        assert [p for share in shares for p in share] == list(range(12 * step, 12 * step + 12))
        assert {len(share) for share in shares} == {12 // processes}


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(SprintError, match=r"^batch_size = 10 does not divide over 4 processes$"):
        batch_positions(0, 10, 0, 4)


def test_every_epoch_shows_every_item_once_in_an_order_of_its_own():
    order = [Shuffled(7, seed=1).index(p) for p in range(7 * 20)]
    epochs = [tuple(order[7 * e : 7 * e + 7]) for e in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 15
    assert [Shuffled(7, seed=2).index(p) for p in range(7 * 20)] != order
    assert epochs[3] == tuple(np.random.default_rng([1, 3]).permutation(7))  # what earlier versions showed


def test_items_in_order_are_given_in_order():
    assert [InOrder(3).index(p) for p in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    source = ItemSource(Numbers(3, in_order=True), Data())
    assert numbers(source, range(2, 7)) == [2, 0, 1, 2, 0]


def test_choices_differ_from_epoch_to_epoch_and_from_seed_to_seed():
    def draws(seed):
        return [sample.position for sample in ItemSource(Numbers(1), Data(seed=seed)).samples(range(50))]

    assert len(set(draws(0))) == len(set(draws(1))) == 50
    assert draws(0) == draws(0) and not set(draws(0)) & set(draws(1))


# Scenes


def test_scene_samples_are_64_pixel_pictures_with_captions():
    for sample in SceneSource().samples(range(6)):
        assert sample.picture.shape == (64, 64, 3) and sample.picture.dtype == np.uint8
        assert 3 < len(sample.caption) < 80


def test_training_series_are_never_the_held_out_one():
    assert SceneSource(4).samples(range(3, 4))[0].caption == scene(TRAINING_SEEDS[4], 3).caption
    assert HELD_OUT_SEED == 2000 and TRAINING_SEEDS[0] == 3000  # as ever: scores are compared over time
    held_out = {scene(HELD_OUT_SEED, i).things for i in range(600)}
    assert len(held_out) == 600
    for seed in (0, 1):
        assert held_out.isdisjoint(scene(TRAINING_SEEDS[seed], i).things for i in range(600))
    with pytest.raises(SprintError, match=r"^data.seed = -1000, but it must be at least 0$"):
        SceneSource(-1000)


def test_seeds_give_different_scenes():
    assert not equal(SceneSource(0).samples(range(3)), SceneSource(1).samples(range(3)))


def test_scenes_are_square_and_never_bad():
    source = open_source(Data(kind=DataKind.scenes, size=64, seed=9))
    assert source == SceneSource(9) == source.batched(4) and source.skipped == {}
    with pytest.raises(SprintError, match=r"^data.aspect_buckets = true, but scenes are all square$"):
        open_source(Data(kind=DataKind.scenes, size=64, aspect_buckets=True))


# Opening


def test_open_source_follows_the_recipe(folder):
    source = open_source(folder_data(folder, 16, seed=3))
    samples = source.samples(range(7))
    assert {s.caption for s in samples} == {"caption deep/er/p6", *(f"caption p{k}" for k in range(6))}
    assert samples[0].picture.shape == (16, 16, 3)
    assert [s.picture[0, 0, 0] for s in samples] == [
        (6, 0, 1, 2, 3, 4, 5)[Shuffled(7, seed=3).index(p)]
        for p in range(7)  # deep/er/p6 is the first by path
    ]


@pytest.mark.parametrize(
    ("kind", "file", "expected"),
    [
        (DataKind.folder, "", FolderItems),
        (DataKind.webdataset, "", WebDatasetItems),
        (DataKind.huggingface, "", HuggingFaceItems),
        (DataKind.prompts, "", PromptItems),
        (DataKind.cache, "cache.json", CachedItems),
        (DataKind.cache, "unfinished.json", CachedItems),
        (DataKind.cache, "", CachedReferenceItems),
    ],
)
def test_each_kind_has_items_of_its_own(tmp_path, monkeypatch, kind, file, expected):
    """Two kinds of cache: ours is known by its cache.json."""
    monkeypatch.setattr(expected, "__init__", lambda self, data: None)
    if file:
        (tmp_path / file).touch()
    assert type(open_items(Data(kind=kind, path=str(tmp_path)))) is expected


def test_nothing_to_read_is_refused():
    with pytest.raises(SprintError, match=r"^shards: no samples there$"):
        ItemSource(Numbers(0), Data(path="shards"))


def test_items_without_an_aspect_refuse_buckets():
    with pytest.raises(SprintError, match=r"^data.aspect_buckets = true, but samples of this kind have no"):
        ItemSource(Numbers(4), Data(aspect_buckets=True))


# Bad samples


BAD = (3, 50, 151, 399)


def test_a_bad_sample_is_replaced_by_one_that_its_position_determines():
    whole = numbers(ItemSource(Numbers(400), Data(seed=1)), range(800))
    source = ItemSource(Numbers(400, BAD), Data(seed=1, bad_share=0.02))
    got = numbers(source, range(800))
    replaced = [p for p in range(800) if whole[p] in BAD]
    assert len(replaced) == 8 and not set(got) & set(BAD)
    assert [p for p in range(800) if got[p] != whole[p]] == replaced
    assert len({got[p] for p in replaced}) == 8  # of other epochs by others

    again = ItemSource(Numbers(400, BAD), Data(seed=1, bad_share=0.02))
    assert [numbers(again, range(p, p + 1))[0] for p in reversed(replaced)] == [
        got[p] for p in reversed(replaced)
    ]
    assert source.skipped == again.skipped == {"NaN latent": 3, "wrong size": 1}


def test_other_batch_sizes_share_the_count_of_bad_samples():
    source = ItemSource(Numbers(400, BAD), Data(bad_share=0.02))
    source.batched(8).samples(range(400))
    assert sum(source.skipped.values()) == 4


def test_bad_samples_are_listed_once_by_several_threads(tmp_path):
    file = tmp_path / "run" / "bad_samples.jsonl"
    source = ItemSource(Numbers(400, BAD), Data(bad_share=0.02), bad_file=file)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: source.samples(range(50 * k, 50 * k + 50)), range(24)))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["where"] for line in lines) == sorted(f"item {k}" for k in BAD)


def test_too_many_bad_samples_stop_the_run(tmp_path):
    source = ItemSource(
        Numbers(1000, range(0, 1000, 20)), Data(bad_share=0.01), bad_file=tmp_path / "bad.jsonl"
    )
    with pytest.raises(SprintError) as caught:
        source.samples(range(1000))
    message = str(caught.value)
    bad = len((tmp_path / "bad.jsonl").read_text().splitlines())
    assert message.startswith("item ") and "\n" not in message
    assert f": wrong size; {bad} of " in message
    assert message.endswith(
        f"samples tried are bad, more than data.bad_share = 0.01 allows ({bad} wrong size; "
        f"listed in {tmp_path / 'bad.jsonl'})"
    )


def test_bad_samples_within_their_share_stop_nothing():
    source = ItemSource(Numbers(1000, range(0, 1000, 20)), Data(bad_share=0.08))
    assert len(source.samples(range(3000))) == 3000
    assert source.skipped == {"wrong size": 50}


@pytest.mark.parametrize("bad_share", [0.01, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 1000])
def test_a_run_of_bad_samples_alone_ends(count, bad_share):
    source = ItemSource(Numbers(count, range(count)), Data(path="shards", bad_share=bad_share))
    with pytest.raises(SprintError) as caught:
        source.samples(range(1))
    assert (f"shards: {LONGEST_CHAIN} bad samples one after the other" in str(caught.value)) == (
        bad_share == 1
    )


# Captions alone


def test_captions_are_those_that_training_meets_first(folder):
    source = open_source(folder_data(folder, seed=5))
    assert source.captions(4) == [sample.caption for sample in source.samples(range(4))]
    assert len(source.captions(10**6)) == len(FolderItems(folder_data(folder)))


def test_captions_pass_over_what_has_none():
    source = ItemSource(Numbers(6, bad=[1, 4], in_order=True), Data(bad_share=0.5))
    assert source.captions(5) == ["0", "2", "3"]
    assert source.skipped == {}  # training will count them
