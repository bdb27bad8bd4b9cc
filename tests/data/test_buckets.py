"""Aspect buckets: shapes, batches of one shape, epochs, stand-ins."""

import logging

import numpy as np
import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from PIL import Image

from sprint.base.errors import SprintError
from sprint.data.bad import BadSamples
from sprint.data.batching import batch_positions
from sprint.data.buckets import Bucketed, find_buckets, shapes_of
from sprint.data.items import BadSample, Items
from sprint.data.source import ItemSource, open_source
from sprint.recipe.schema import Data, DataKind
from tests.data.picture_files import write_pair

SHAPES = ((32, 64), (64, 64), (64, 32))
COUNTS = (10, 23, 3)  # items of each shape, the rest bad
BUCKETS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, -1], [*COUNTS, 4]))
BATCH = 4
PER_EPOCH = (2 + 5 + 0) * BATCH


def bucketed(seed=0):
    return Bucketed(BUCKETS, SHAPES, BATCH, seed)


# Shapes


def test_without_buckets_there_is_one_square():
    assert shapes_of(Data(size=96)) == ((96, 96),)


@pytest.mark.parametrize(("size", "table"), [(1024, ASPECT_RATIO_1024_BIN), (512, ASPECT_RATIO_512_BIN)])
def test_shapes_of_sanas_sizes_are_sanas(size, table):
    shapes = shapes_of(Data(size=size, aspect_buckets=True))
    assert [list(shape) for shape in shapes] == list(table.values()) and len(shapes) == 33
    assert shapes[0] == (size // 2, 2 * size) and all(type(side) is int for shape in shapes for side in shape)


@pytest.mark.parametrize("size", [16, 64, 256, 768, 1536])
def test_other_sizes_are_scaled_to_whole_cells(size):
    shapes = shapes_of(Data(size=size, aspect_buckets=True))
    assert len(set(shapes)) == len(shapes)
    assert all(side % 32 == 0 and side > 0 for shape in shapes for side in shape)
    if size >= 256:
        assert all(abs(height * width / size**2 - 1) < 0.26 for height, width in shapes)
        assert (size, size) in shapes
    assert shapes_of(Data(size=64, aspect_buckets=True))[0] == (32, 128)


# Order


def test_every_batch_has_one_shape_and_every_epoch_its_own_remainder():
    order = bucketed()
    seen, remainders = [], []
    for epoch in range(20):
        epoch_items = [order.index(p) for p in range(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH)]
        batches = np.array(epoch_items).reshape(-1, BATCH)
        assert all(len(set(BUCKETS[batch])) == 1 for batch in batches)
        assert len(set(epoch_items)) == PER_EPOCH  # no item twice
        assert np.bincount(BUCKETS[epoch_items]).tolist() == [
            8,
            20,
        ]  # none that is bad, or of a shape too rare
        seen.append(tuple(epoch_items))
        remainders.append(frozenset(range(len(BUCKETS))) - set(epoch_items))
    assert len(set(seen)) == 20 and len(set(remainders)) > 15
    firsts = {BUCKETS[epoch[0]] for epoch in seen}
    assert firsts == {0, 1}  # batches are shuffled, not bucket by bucket


def test_the_order_is_a_function_of_seed_and_position():
    whole = [bucketed(3).index(p) for p in range(5 * PER_EPOCH)]
    backwards = bucketed(3)
    assert [backwards.index(p) for p in reversed(range(5 * PER_EPOCH))] == whole[::-1]
    assert [bucketed(4).index(p) for p in range(5 * PER_EPOCH)] != whole


def test_shape_and_stand_ins_are_those_of_the_bucket():
    order, draw = bucketed(), np.random.default_rng(0)
    for position in range(PER_EPOCH):
        bucket = BUCKETS[order.index(position)]
        assert order.shape(position) == SHAPES[bucket]
        others = {order.another(position, draw) for _ in range(200)}
        assert others == set(np.flatnonzero(bucket == BUCKETS))


def test_shapes_that_fill_no_batch_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        bucketed()
    assert caplog.messages == ["3 pictures have shapes that are too rare to fill a batch of 4"]
    with pytest.raises(
        SprintError, match=r"^no shape has the 40 pictures of a batch \(40 pictures in all\); use"
    ):
        Bucketed(BUCKETS, SHAPES, 40, 0)


# From a folder


@pytest.fixture
def folder(tmp_path):
    """Thirty pictures of three aspects, and one that only its header knows."""
    for k in range(30):
        size = ((90, 30), (50, 50), (20, 80))[k % 3]  # width, height
        write_pair(tmp_path, f"p{k:02}", color=(k, k, k), size=size)
    whole = write_pair(tmp_path, "q", size=(50, 50))
    whole.write_bytes(whole.read_bytes()[:60])
    return tmp_path


def data_of(folder, **settings):
    settings = {"size": 64, "aspect_buckets": True, "bad_share": 0.1, "workers": 2, **settings}
    return Data(kind=DataKind.folder, path=str(folder), **settings)


def test_batches_of_a_folder_have_one_shape_whoever_asks(folder):
    source = open_source(data_of(folder), batch_size=4)
    shapes = set()
    for step in range(20):
        batch = source.samples(batch_positions(step, 4))
        assert len({sample.picture.shape for sample in batch}) == 1
        shapes.add(batch[0].picture.shape)
        halves = [source.samples(batch_positions(step, 4, rank, 2)) for rank in range(2)]
        assert [s.caption for half in halves for s in half] == [s.caption for s in batch]
    assert shapes == {(32, 96, 3), (64, 64, 3), (128, 32, 3)}
    assert source.skipped == {"unreadable picture": 1}
    assert {s.picture.shape for s in source.batched(10).samples(range(10))} < shapes


def test_a_picture_that_is_not_as_its_header_says_is_replaced(folder, monkeypatch):
    """`size` calls p00 square; its pixels are not."""
    from sprint.data.kinds.folder import FolderItems

    size = FolderItems.size
    monkeypatch.setattr(FolderItems, "size", lambda self, k: (50, 50) if k == 0 else size(self, k))
    source = open_source(data_of(folder), batch_size=2)
    samples = source.samples(range(60))
    assert all(a.picture.shape == b.picture.shape for a, b in zip(samples[::2], samples[1::2], strict=True))
    assert source.skipped == {"wrong size": 1, "unreadable picture": 1}
    assert str(folder / "p00.png") in source._bad._reasons


class Sizes(Items):
    """Item k is of sizes[k]."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def item(self, index, draw): ...

    def size(self, index):
        if self.sizes[index] is None:
            raise BadSample("unreadable picture", self.where(index))
        return self.sizes[index]


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (-1, 8), (float("inf"), 8), (8, float("nan")), (10**7, 8)])
def test_sizes_that_no_picture_has_are_bad(size):
    bad = BadSamples(1.0, 2)
    assert find_buckets(Sizes([(8, 8), size]), [(8, 8)], bad, 1).tolist() == [0, -1]
    assert bad.by_reason == {"wrong size": 1} and "sample 1" in bad._reasons


def test_processes_that_share_their_buckets_agree():
    """The second process fails to read one header, which the first could read."""
    sizes = [(512, 512), (512, 512), (256, 1024), (256, 1024)] * 4
    data = Data(kind=DataKind.folder, size=512, aspect_buckets=True, bad_share=0.5)
    shared, found = [], []
    first = ItemSource(Sizes(sizes), data, 2, share=lambda own: shared.append(own) or own)
    second = ItemSource(Sizes([None, *sizes[1:]]), data, 2, share=lambda own: found.append(own) or shared[0])
    assert found[0].tolist() == [-1, *shared[0].tolist()[1:]] and shared[0].dtype == np.int16
    orders = [[source._order.index(p) for p in range(32)] for source in (first, second, second.batched(2))]
    assert orders[0] == orders[1] == orders[2] and 0 in orders[1]


def test_a_scan_that_meets_too_many_bad_headers_stops(folder):
    for k in range(10):
        (folder / f"p{k:02}.png").write_bytes(b"")
    with pytest.raises(
        SprintError, match=r"unreadable picture: .* samples tried are bad, more than data.bad_share"
    ):
        open_source(data_of(folder))


def test_the_scan_reads_headers_alone_and_keeps_the_order(folder, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", None)

    class Many(Items):
        def __len__(self):
            return 9000  # several rounds of the threads

        def item(self, index, draw): ...

        def size(self, index):
            if index == 8999:
                raise BadSample("unreadable picture", "the last")
            return (1 + index % 7, 4)

    bad = BadSamples(0.01, 9000)
    shapes = [(k, 4) for k in range(1, 8)]
    assert find_buckets(Many(), shapes, bad, 3).tolist() == [*(k % 7 for k in range(8999)), -1]
    assert bad.by_reason == {"unreadable picture": 1}
    open_source(data_of(folder))
