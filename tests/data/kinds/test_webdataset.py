"""Shards of pictures: captions in every place, sizes, and what is bad."""

import io
import json
import logging

import numpy as np
import pytest
from PIL import Image

from sprint.base.errors import SprintError
from sprint.data.items import BadSample
from sprint.data.kinds.webdataset import HEAD, WebDatasetItems
from sprint.data.source import open_source
from sprint.recipe.schema import Data, DataKind
from tests.data.tar.test_samples import plain, write_tar

DRAW = np.random.default_rng(0)


def picture(color=(10, 20, 30), size=(8, 8), format="PNG", **save) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, format, **save)
    return stream.getvalue()


def data(path, **fields) -> Data:
    return Data(**{"kind": DataKind.webdataset, "path": str(path), "size": 8} | fields)


def shard(folder, captions: dict[str, bytes], name="s.tar", content=None, **fields) -> WebDatasetItems:
    """One sample "k" with a picture and these members."""
    entries = [plain("k.png", content or picture()), *(plain(f"k.{s}", c) for s, c in captions.items())]
    write_tar(folder / name, entries)
    return WebDatasetItems(data(folder, **fields))


def caption(items: WebDatasetItems, index=0) -> str:
    return items.item(index, np.random.default_rng(0)).caption


def drawn(items: WebDatasetItems, times=400) -> dict[str, float]:
    """Share of each caption."""
    draw = np.random.default_rng(0)
    captions = [items.item(0, draw).caption for _ in range(times)]
    return {text: captions.count(text) / times for text in sorted(set(captions))}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"json": b'{"prompt": " a cat "}'}, "a cat"),
        ({"json": b'{"caption": "a cat", "width": 3}'}, "a cat"),
        ({"json": b'{"text": "a cat"}'}, "a cat"),
        ({"json": b'{"prompt": "a cat", "clip_scores": [0.3, 0.2]}'}, "a cat"),
        ({"json": b'{"caption": null, "text": "a cat"}'}, "a cat"),
        ({"json": b'{"captions": ["a cat"], "prompt": "no"}'}, "a cat"),
        ({"json": b'{"captions": ["no", "a cat"], "clip_scores": [0.1, 30.0]}'}, "a cat"),
        ({"txt": "\ufeffun été\n".encode()}, "un été"),
        ({"json": b'{"width": 8}', "txt": b"a cat"}, "a cat"),
        ({"json": b'{"prompt": "no"}', "txt": b"a cat", "caption": b"no"}, "a cat"),
        ({"json": b'{"prompt": "no"}', "caption": b"a cat"}, "a cat"),
        ({"json": b'["a cat"]'}, "a cat"),
    ],
)
def test_captions_come_from_json_or_text(members, expected, tmp_path):
    assert caption(shard(tmp_path, members)) == expected


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "PNG"])
def test_pictures_of_every_suffix(suffix, format, tmp_path):
    write_tar(
        tmp_path / "s.tar", [plain(f"k.{suffix}", picture(format=format, quality=100)), plain("k.txt", b"a")]
    )
    sample = WebDatasetItems(data(tmp_path)).item(0, DRAW)
    assert sample.picture.shape == (8, 8, 3) and abs(sample.picture - np.array([10.0, 20, 30])).max() <= 3


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([plain("k.txt", b"a")], "s.tar: k: missing picture: there are txt"),
        ([plain("k.png", picture())], "s.tar: k: missing caption: there are png"),
        ([plain("k.png", picture()), plain("k.txt", b" ")], "s.tar: k: empty caption"),
        (
            [plain("k.png", picture()), plain("k.txt", b"\xff\xfe")],
            "s.tar: k: unreadable caption: it is UTF-16; save it as UTF-8",
        ),
        (
            [plain("k.png", picture()), plain("k.json", b'{"prompt": 3}')],
            "s.tar: k: unreadable caption: neither",
        ),
        (
            [plain("k.png", picture()), plain("k.json", b'{"prompt"')],
            "s.tar: k: unreadable caption: it is not valid JSON",
        ),
        (
            [plain("k.png", picture()), plain("k.json", b'{"url": "x", "id": 3}')],
            "s.tar: k: missing caption: has url, id; expected one of captions, prompt, caption",
        ),
        (
            [plain("k.png", picture()), plain("k.json", b"[" * 10**5)],
            "s.tar: k: unreadable caption: it is not valid JSON: recursion",
        ),
        (
            [plain("k.png", picture()), plain("k.json", b'{"prompt": "\\ud800"}')],
            "s.tar: k: unreadable caption: it is not valid JSON: unexpected end of hex",
        ),
        ([plain("k.png", picture()[:45]), plain("k.txt", b"a")], "s.tar: k: unreadable picture"),
        ([plain("k.png", b"GIF89a"), plain("k.txt", b"a")], "s.tar: k: unreadable picture"),
        ([plain("k.png"), plain("k.txt", b"a")], "s.tar: k: unreadable picture"),
    ],
)
def test_bad_samples_say_what_is_wrong(entries, message, tmp_path):
    write_tar(tmp_path / "s.tar", [plain("good.png", picture()), plain("good.txt", b"good"), *entries])
    items = WebDatasetItems(data(tmp_path))
    assert caption(items) == "good"
    with pytest.raises(BadSample) as error:
        items.item(1, DRAW)
    assert str(error.value).startswith(message)


def test_what_was_passed_over_stands_behind_the_samples(tmp_path):
    entries = [
        plain("k.png", picture()),
        plain("k.txt", b"a"),
        plain("../evil.png", picture()),
        plain("/x.txt", b"b"),
    ]
    write_tar(tmp_path / "s.tar", entries)
    items = WebDatasetItems(data(tmp_path))
    assert len(items) == 3
    for index, name in ((1, "'../evil.png'"), (2, "'/x.txt'")):
        for ask in (lambda k: items.item(k, DRAW), items.size):
            with pytest.raises(
                BadSample, match=f"s.tar: byte [0-9]+, {name}: hostile entry: a path that"
            ) as bad:
                ask(index)
            assert bad.value.where == items.where(index)


def test_shards_without_pictures_are_refused(tmp_path):
    write_tar(tmp_path / "s.tar", [plain("k.txt", b"a")])
    with pytest.raises(SprintError, match=r"no pictures in these shards \(txt\); expected KEY.jpg"):
        WebDatasetItems(data(tmp_path))
    write_tar(tmp_path / "s.tar", [plain("k.npy", b"a")])
    with pytest.raises(SprintError, match=r"these hold latents: set data\.kind = cache"):
        WebDatasetItems(data(tmp_path))


# Sizes


@pytest.mark.parametrize("size", [b'"height": 20, "width": 30', b'"height": 0, "width": Infinity', b'"a": 1'])
def test_the_size_is_that_of_the_upright_picture_whatever_its_json_says(size, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = picture(size=(30, 20), format="JPEG", exif=exif)
    items = shard(tmp_path, {"json": b'{"prompt": "a", %s}' % size}, content=content)
    assert items.size(0) == (30, 20)


def test_pictures_that_exif_turns_have_buckets(tmp_path):
    """Stored 160×80 and shown 80×160; the JSON tells the former."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = picture(size=(160, 80), format="JPEG", exif=exif)
    about = b'{"prompt": "a", "height": 80, "width": 160}'
    write_tar(tmp_path / "s.tar", [plain("a.jpg", turned), plain("a.json", about)])
    source = open_source(data(tmp_path, size=64, aspect_buckets=True))
    height, width, _ = source.samples(range(1))[0].picture.shape
    assert height > width and source.skipped == {}


def test_size_reads_the_start_of_a_picture_and_more_only_if_it_must(tmp_path, monkeypatch):
    write_tar(
        tmp_path / "s.tar",
        [
            plain("a.jpg", picture(size=(30, 20), format="JPEG") + bytes(2 * HEAD)),
            plain("b.jpg", picture(size=(40, 20), format="JPEG", icc_profile=bytes(2 * HEAD))),
        ],
    )
    items, lengths = WebDatasetItems(data(tmp_path)), []
    read = type(items.tar)._read
    monkeypatch.setattr(
        type(items.tar), "_read", lambda s, k, run: lengths.append(run[0][2]) or read(s, k, run)
    )
    assert items.size(0) == (20, 30) and lengths == [HEAD]
    assert items.size(1) == (20, 40) and lengths[1] == HEAD and lengths[2] > 2 * HEAD


def test_aspect_buckets_give_nearest_shapes(tmp_path):
    items = shard(tmp_path, {"txt": b"a"}, content=picture(size=(160, 40)), size=512, aspect_buckets=True)
    height, width = items.item(0, DRAW).picture.shape[:2]
    assert height % 32 == width % 32 == 0 and 3.5 < width / height <= 4


# Captions beside the shard


def beside(folder, **files) -> None:
    for name, content in files.items():
        (folder / f"s{name}.json").write_text(json.dumps(content))


OWN = {"json": b'{"prompt": "own", "alt": "alt", "width": 8}'}


def test_without_scores_all_captions_are_alike(tmp_path):
    beside(
        tmp_path, _A={"k": {"long": "a1", "short": "a2"}}, _B_13={"k": {"prompt": "b"}, "j": {"prompt": "no"}}
    )
    shares = drawn(shard(tmp_path, OWN))
    assert shares.keys() == {"own", "a1", "a2", "b"} and all(0.17 < share < 0.33 for share in shares.values())


def test_scores_choose_among_the_captions_that_have_them(tmp_path):
    beside(
        tmp_path,
        _A={"k": {"long": "a1", "short": "a2"}},
        _B={"k": {"prompt": "b"}},
        _A_clip_score={"k": {"long": "0.3", "gone": "9"}},
        _prompt_clip_score={"k": {"prompt": 0.2, "alt": 0.2}},
    )
    shares = drawn(shard(tmp_path, OWN, caption_temperature=0.1))
    e = np.exp(1.0)
    assert shares.keys() == {"a1", "alt", "own"}
    assert abs(shares["a1"] - e / (e + 2)) < 0.07 and abs(shares["own"] - 1 / (e + 2)) < 0.07


def test_a_prompt_beside_the_shard_is_named_after_its_file(tmp_path):
    beside(tmp_path, _B={"k": {"prompt": "b"}}, _clip_score={"k": {"_B": 30, "prompt": 20}})
    assert drawn(shard(tmp_path, OWN, caption_temperature=0.1), 20) == {"b": 1.0}


def test_captions_may_stand_beside_the_shard_alone(tmp_path):
    beside(tmp_path, **{"": {"k": {"any": "beside"}}})
    assert caption(shard(tmp_path, {})) == "beside"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"_A": {"k": "text"}}, "unreadable caption: not a JSON object"),
        ({"_clip_score": {"k": {"prompt": "high"}}}, "unreadable caption: a score is no number"),
        ({"_clip_score": {"k": {"prompt": 10**400}}}, "unreadable caption: a score is no number"),
        ({"_clip_score": {"k": {"prompt": None}}}, "unreadable caption: a score is no number"),
        (
            {"_clip_score": {"k": {"prompt": "NaN"}}},
            "unreadable caption: clip_scores hold",
        ),
    ],
)
def test_bad_captions_beside_the_shard(files, message, tmp_path):
    beside(tmp_path, **files)
    with pytest.raises(BadSample, match=message):
        caption(shard(tmp_path, OWN))


def test_captions_in_the_shard_and_beside_it_go_together(tmp_path):
    beside(tmp_path, _A={"k": {"long": "a"}})
    assert drawn(shard(tmp_path, {"json": b'{"captions": ["x", "y"]}'}), 50).keys() == {"x", "y", "a"}
    assert drawn(shard(tmp_path, {"txt": b"t"}), 50).keys() == {"t", "a"}
    with pytest.raises(BadSample, match="unreadable caption: neither text nor a list of texts"):
        caption(shard(tmp_path, {"json": b'{"prompt": 3}'}))


def test_what_others_write_beside_shards_does_no_harm(tmp_path):
    beside(tmp_path, _stats={"count": 3, "status_dict": {"success": 3}})
    assert caption(shard(tmp_path, OWN)) == "own"


# As a source


def test_a_source_passes_over_bad_samples_and_hostile_entries(tmp_path, caplog):
    entries = [plain("bad.png", b"noise"), plain("bad.txt", b"a"), plain("../evil.txt", b"a")]
    for k in range(10):
        entries += [plain(f"{k}.png", picture((k, k, k))), plain(f"{k}.txt", b"%d" % k)]
    write_tar(tmp_path / "s.tar", entries)
    source = open_source(data(tmp_path, bad_share=0.5))
    with caplog.at_level(logging.ERROR):
        samples = source.samples(range(24))
    assert len(samples) == 24 and {sample.caption for sample in samples} == set("0123456789")
    assert all((sample.picture == int(sample.caption)).all() for sample in samples)
    assert source.skipped == {"unreadable picture": 1, "hostile entry": 1}
    with pytest.raises(SprintError, match=r"2 of \d+ samples tried"):
        open_source(data(tmp_path, bad_share=0.1)).samples(range(24))
