"""Latents and text as Sana's own code caches them."""

import io
import zipfile

import numpy as np
import pytest
import torch

from sprint.base.errors import SprintError
from sprint.data.arrays import npy_array
from sprint.data.cache.sana import CachedReferenceItems, npz_text
from sprint.data.items import BadSample
from sprint.data.source import open_source
from sprint.recipe.schema import Data, DataKind
from tests.data.tar.test_samples import plain, write_tar

C, T, D = 4, 5, 6
DRAW = np.random.default_rng(0)


def npy(array, **save) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **save)
    return stream.getvalue()


def npz(save=np.savez, **arrays) -> bytes:
    stream = io.BytesIO()
    save(stream, **arrays)
    return stream.getvalue()


def latent(seed=0, shape=(C, 2, 2)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


def text(seed=0, tokens=3) -> dict[str, np.ndarray]:
    feature = np.random.default_rng(seed).normal(size=(1, T, D)).astype(np.float16)
    return {"caption_feature": feature, "attention_mask": (np.arange(T) < tokens).astype(np.int16)[None]}


def sample(key: str, seed=0, **members: bytes) -> list:
    about = b'{"height": 700, "width": 512, "prompt": "a cat"}'
    members = {"json": about, "npy": npy(latent(seed)), "npz": npz(**text(seed))} | members
    return [plain(f"{key}.{suffix}", content) for suffix, content in members.items()]


def data(path, **fields) -> Data:
    return Data(**{"kind": DataKind.cache, "path": str(path), "size": 64} | fields)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_samples_are_the_stored_numbers_without_padding(dtype, save, tmp_path):
    stored = latent().astype(dtype)
    members = {"npy": npy(np.asfortranarray(stored)), "npz": npz(save, **text(tokens=3))}
    write_tar(tmp_path / "s.tar", sample("a", **members))
    items = CachedReferenceItems(data(tmp_path))
    encoded = items.item(0, DRAW)
    assert encoded.latent.dtype == encoded.text.dtype == torch.float32
    assert np.array_equal(encoded.latent, latent()) and encoded.latent.is_contiguous()
    assert np.array_equal(encoded.text, text()["caption_feature"][0, :3])
    assert (
        (items.latent_shape, items.text_width) == ((C, 2, 2), D)
        and items.size(0) == (64, 64)
        and len(items) == 1
    )


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"npz": npz(caption_feature=text()["caption_feature"])}, (T, D)),
        ({"npz": npz(caption_feature=text()["caption_feature"][0])}, (T, D)),
        ({"npz": npz(**text() | {"attention_mask": np.array([1, 0, 1, 0, 0], bool)})}, (2, D)),
        ({"npz": npz(**text() | {"attention_mask": np.ones((1, 1, T), np.int64)})}, (T, D)),
        ({"npy": npy(latent()[None])}, (3, D)),
    ],
)
def test_shapes_that_the_reference_takes(members, expected, tmp_path):
    write_tar(tmp_path / "s.tar", sample("a", **members))
    encoded = CachedReferenceItems(data(tmp_path)).item(0, DRAW)
    assert tuple(encoded.text.shape) == expected and tuple(encoded.latent.shape) == (C, 2, 2)


def lying(shape: str) -> bytes:
    """An .npy of one number, whose header says another shape."""
    content = npy(np.zeros((1, 1, 1), np.float32))
    return content.replace(b"(1, 1, 1), } " + b" " * (len(shape) - 9), f"{shape}, }} ".encode())


NAN, INF = latent(), latent()
NAN[0, 0, 0], INF[1, 1, 1] = np.nan, -np.inf
BROKEN_TEXT = npz(**text())[:200]
BAD = [
    ({"npy": npy(NAN)}, "NaN latent"),
    ({"npy": npy(INF)}, "NaN latent"),
    ({"npy": npy(latent()[0])}, "wrong size: latent [2, 2], but data.size wants [C, 2, 2]"),
    ({"npy": npy(latent(shape=(2, C, 2, 2)))}, "wrong size: latent [2, 4, 2, 2]"),
    ({"npy": npy(latent(shape=(C, 2, 3)))}, "wrong size: latent [4, 2, 3]"),
    (
        {"npy": npy(latent(shape=(C + 1, 2, 2)))},
        "wrong size: 5 channels and text of 6, but the first sample has 4 and 6",
    ),
    ({"npy": npy(np.array([None, {}]), allow_pickle=True)}, "unreadable latent: an array of object"),
    ({"npy": npy(latent().astype("c8"))}, "unreadable latent: an array of complex64"),
    ({"npy": npy(latent())[:-1]}, "unreadable latent: 31 bytes for an array [4, 2, 2] of float16"),
    ({"npy": lying("(99999999999, 9999999999, 9)")}, "unreadable latent: 4 bytes for an array [99999999999,"),
    ({"npy": lying("(-1, -1, 1)")}, "unreadable latent: "),
    ({"npy": b"noise"}, "unreadable latent"),
    ({"npy": b""}, "unreadable latent"),
    ({"npz": npz(**text() | {"caption_feature": np.full((1, T, D), np.inf)})}, "NaN text"),
    (
        {"npz": npz(**text() | {"attention_mask": np.zeros((1, T))})},
        "missing text: attention_mask is 0 everywhere",
    ),
    (
        {"npz": npz(**text() | {"attention_mask": np.ones((1, T - 1))})},
        "unreadable text: caption_feature [5, 6] with",
    ),
    ({"npz": npz(caption_feature=np.zeros((2, T, D)))}, "unreadable text: caption_feature [2, 5, 6]"),
    (
        {"npz": npz(caption_feature=np.zeros((1, T, D + 1)))},
        "wrong size: 4 channels and text of 7, but the first sample has 4 and 6",
    ),
    ({"npz": npz(caption_feature=np.array([{}]))}, "unreadable text: an array of object"),
    ({"npz": npz(caption_feature=np.zeros((1, T, 0)))}, "unreadable text: caption_feature [5, 0]"),
    ({"npz": npz(other=np.zeros(3))}, "unreadable text: \"There is no item named 'caption_feature.npy'"),
    ({"npz": BROKEN_TEXT}, "unreadable text: File is not a zip file"),
    ({"npz": npy(latent())}, "unreadable text: File is not a zip file"),
]


@pytest.mark.parametrize(("members", "message"), BAD)
def test_bad_samples_say_what_is_wrong(members, message, tmp_path):
    write_tar(tmp_path / "s.tar", [*sample("a"), *sample("b", **members)])
    items = CachedReferenceItems(data(tmp_path))
    items.item(0, DRAW)
    with pytest.raises(BadSample) as error:
        items.item(1, DRAW)
    assert str(error.value).startswith(f"s.tar: b: {message}")


def test_members_that_are_missing(tmp_path):
    only = [[plain("b.npz", npz(**text()))], [plain("c.npy", npy(latent()))], [plain("../x.npy", b"")]]
    write_tar(tmp_path / "s.tar", [*sample("a"), *(entry for entries in only for entry in entries)])
    items = CachedReferenceItems(data(tmp_path, bad_share=0.5))
    for index, message in ((1, "b: missing latent"), (2, "c: missing text"), (3, ".*hostile entry")):
        with pytest.raises(BadSample, match=f"s.tar: {message}"):
            items.item(index, DRAW)
    for index, message in ((1, "b: missing latent"), (3, ".*hostile entry")):
        with pytest.raises(BadSample, match=f"s.tar: {message}"):
            items.size(index)


@pytest.mark.parametrize("shape", [(C, 0, 2), (C, 2, 0), (0, 2, 2)])
def test_a_latent_without_numbers_is_bad(tmp_path, shape):
    write_tar(tmp_path / "s.tar", [*sample("a"), *sample("b", npy=npy(latent(shape=shape)))])
    items = CachedReferenceItems(data(tmp_path))
    for read in [lambda: items.item(1, DRAW)] + [lambda: items.size(1)] * (shape[0] > 0):
        with pytest.raises(BadSample, match=r"s\.tar: b: wrong size: latent"):
            read()


def test_text_may_lie_in_files_beside_the_shard(tmp_path):
    write_tar(tmp_path / "deep" / "s.tar", [plain(f"{key}.npy", npy(latent())) for key in ("a", "b")])
    (tmp_path / "deep" / "b.npz").write_bytes(npz(**text(7)))
    items = CachedReferenceItems(data(tmp_path))
    assert np.array_equal(items.item(1, DRAW).text, text(7)["caption_feature"][0, :3])
    with pytest.raises(BadSample, match="missing text"):
        items.item(0, DRAW)


def test_latents_without_text_are_refused_at_once(tmp_path):
    write_tar(tmp_path / "s.tar", [*sample("a"), plain("x/b.npy", npy(latent()))])
    message = (
        r"s\.tar: x/b: latent without embedded text \(1 of 2\); put x/b\.npz \(caption_feature \[1, T, D\], "
        r"attention_mask \[1, T\]\) into the shard or beside it, or make a cache of the pictures"
    )
    with pytest.raises(SprintError, match=message):
        CachedReferenceItems(data(tmp_path, bad_share=0.4))
    assert len(CachedReferenceItems(data(tmp_path, bad_share=0.5))) == 2


def test_shards_without_latents_or_of_another_size_are_refused(tmp_path):
    write_tar(tmp_path / "s.tar", [plain("a.npz", npz(**text()))])
    with pytest.raises(SprintError, match="no latents in these shards"):
        CachedReferenceItems(data(tmp_path))
    write_tar(tmp_path / "s.tar", sample("a") + sample("b"))
    with pytest.raises(SprintError, match=r"s\.tar: a: wrong size: .*nor can any of the first 2 samples"):
        CachedReferenceItems(data(tmp_path, size=128))


def test_buckets_take_latents_of_their_shapes_alone(tmp_path):
    shapes = {"wide": (C, 9, 28), "square": (C, 16, 16), "odd": (C, 9, 31)}
    write_tar(tmp_path / "s.tar", [e for k, s in shapes.items() for e in sample(k, npy=npy(latent(shape=s)))])
    items = CachedReferenceItems(data(tmp_path, size=512, aspect_buckets=True))
    assert [items.size(k) for k in range(3)] == [(288, 896), (512, 512), (288, 992)]
    assert [items.item(k, DRAW).latent.shape[1:] for k in range(2)] == [(9, 28), (16, 16)]
    with pytest.raises(
        BadSample, match=r"wrong size: latent \[4, 9, 31\], but data\.size wants .* or 32 others"
    ):
        items.item(2, DRAW)


def test_the_empty_prompt_lies_beside_the_shards(tmp_path):
    write_tar(tmp_path / "s.tar", sample("a"))
    with pytest.raises(SprintError, match=r"null\.npz: missing; write caption_feature"):
        _ = CachedReferenceItems(data(tmp_path)).null
    (tmp_path / "null.npz").write_bytes(b"noise")
    with pytest.raises(SprintError, match=r"null\.npz: cannot be read: File is not a zip file"):
        _ = CachedReferenceItems(data(tmp_path)).null
    (tmp_path / "null.npz").write_bytes(npz(**text(3, tokens=1)))
    feature, mask = CachedReferenceItems(data(tmp_path)).null
    assert np.array_equal(feature, text(3)["caption_feature"]) and mask.tolist() == [[1, 0, 0, 0, 0]]
    assert (feature.dtype, mask.dtype) == (torch.float32, torch.long)


def test_a_source_of_kind_cache_opens_this_layout(tmp_path):
    write_tar(tmp_path / "s.tar", [*sample("a"), *sample("b", npy=npy(NAN)), *sample("c", 5)])
    source = open_source(data(tmp_path, bad_share=0.5))
    found = {tuple(encoded.latent.flatten().tolist()) for encoded in source.samples(range(12))}
    assert found == {tuple(latent(seed).astype(np.float32).flatten().tolist()) for seed in (0, 5)}
    assert source.skipped == {"NaN latent": 1}


def test_a_bomb_is_not_unpacked():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("caption_feature.npy", bytes(2**28 + 1))
    assert len(stream.getvalue()) < 2**20
    with pytest.raises(ValueError, match="caption_feature has 268435457 bytes"):
        npz_text(stream.getvalue())


@pytest.mark.filterwarnings("ignore")  # of numpy, which reads headers of Python 2 too
def test_flipped_bytes_never_crash(tmp_path):
    write_tar(tmp_path / "s.tar", sample("a"))
    items, random = CachedReferenceItems(data(tmp_path)), np.random.default_rng(0)
    whole = {"npy": npy(latent()), "npz": npz(np.savez_compressed, **text())}
    good = 0
    for _ in range(1000):
        broken = {}
        for suffix, content in whole.items():
            broken[suffix] = bytearray(content)
            for place in random.integers(len(content), size=2).tolist():
                broken[suffix][place] = int(random.integers(256))
        items.read = lambda index, suffixes, most=0, broken=broken: {s: bytes(c) for s, c in broken.items()}
        try:
            items.size(0), items.item(0, DRAW)
            good += 1
        except BadSample as bad:
            assert len(str(bad).splitlines()) == 1
    assert good < 1000


def test_the_array_is_the_numpys():
    for array in (
        np.arange(6.0).reshape(2, 3),
        np.float32(3.0),
        np.zeros((0, 3)),
        np.arange(4, dtype=np.uint8),
    ):
        read = npy_array(npy(array))
        assert read.dtype == array.dtype and np.array_equal(read, array)


def test_a_prompt_is_read_where_there_is_one(tmp_path):
    write_tar(tmp_path / "x.tar", sample("a") + sample("b", json=b'{"height": 700}'))
    items = CachedReferenceItems(data(tmp_path))
    assert items.caption(0, None) == "a cat"
    with pytest.raises(BadSample, match="unreadable caption"):
        items.caption(1, None)
