"""A cache read: the same batches as online encoding, no networks, and every damage named."""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from sprint.base.errors import SprintError
from sprint.data.batch import flat
from sprint.data.batching import collate, encode
from sprint.data.cache import items as cache
from sprint.data.cache.items import CACHE, NULL, CachedItems, verify
from sprint.data.cache.shards import Entry, read_record, write_shard
from sprint.data.encode.make import make_cache
from sprint.data.items import BadSample
from sprint.data.source import open_source
from sprint.models.encoders import encode_null
from sprint.models.families import load_family
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Data, DataKind, Text
from sprint.train.adapt import AdaptStage
from sprint.train.distill import DistillStage
from sprint.weights.identity import family_weights
from tests.cli.cases import ROOT
from tests.data.cache.test_shards import encoded
from tests.sample.test_generate import CHANNELS, TEXT_WIDTH
from tests.tiny import tiny_network, tiny_recipe
from tests.tolerance import assert_close, growing, of_network, rounding

pytest_plugins = "tests.cli.fixtures"

STORED = {"fp32": 0.0, "bf16": rounding(torch.bfloat16)}  # what it costs to keep a number so
COUNT, SIZE = 7, 16  # pictures, pixels
LATENT = (CHANNELS, SIZE // 4, SIZE // 4)
ANY = np.random.default_rng(0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Pictures of noise, and captions of many lengths."""
    folder = tmp_path_factory.mktemp("pictures")
    for k in range(COUNT):
        noise = np.random.default_rng(k).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text("blue squares, " * k + "a dot")
    return folder


@pytest.fixture(scope="module")
def picture_recipe(recipe, pictures):
    """Session fixture `recipe` is the miniature family's."""
    return load_recipe(recipe, ["data.kind=folder", f"data.path={pictures}", f"data.size={SIZE}"])


@pytest.fixture(scope="module")
def caches(picture_recipe, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("caches")
    for dtype in ("fp32", "bf16"):
        make_cache(picture_recipe, root / dtype, shard_size=3, dtype=dtype)
    return {dtype: root / dtype for dtype in ("fp32", "bf16")}


@pytest.fixture
def copied(caches, tmp_path) -> Path:
    """A cache to be damaged."""
    return shutil.copytree(caches["bf16"], tmp_path / "cache")


def data_of(folder: Path, **changes) -> Data:
    return Data(**{"kind": DataKind.cache, "path": str(folder), "size": SIZE} | changes)


def both_batches(picture_recipe, folder: Path, positions: range):
    """The same positions of a run, read from the cache and encoded online."""
    text = picture_recipe.text
    family = load_family(picture_recipe.teacher, text.max_length, text.instruction)
    cached = collate(open_source(data_of(folder)).samples(positions), "cpu", max_length=text.max_length)
    return cached, encode(open_source(picture_recipe.data).samples(positions), family)


# ---- the same as online -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORED)
def test_batches_of_two_epochs_are_those_of_online_encoding(picture_recipe, caches, dtype):
    family = load_family(picture_recipe.teacher, 80, False)
    of_latents = of_network(family.autoencoder.encoder) + STORED[dtype]
    of_texts = of_network(family.text_encoder) + STORED[dtype]
    for start in (0, 5):  # the second begins in one epoch and ends in the next
        cached, online = both_batches(picture_recipe, caches[dtype], range(start, start + 5))
        assert cached.latent.shape == (5, *LATENT) and cached.latent.dtype == torch.float32
        assert_close(cached.latent, online.latent, of_latents)
        assert torch.equal(cached.mask, online.mask)
        real = cached.mask.bool()
        assert_close(cached.text[real], online.text[real], of_texts)
        assert (cached.text[~real] == 0).all() and not real.all()


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("stage", ["adapt", "distill"])
def test_first_losses_of_both_stages_are_those_of_online_encoding(
    picture_recipe, caches, engine, stage, dtype
):
    """Padding differs, encoder's output there and zeros here: it must not count."""
    recipe, items = tiny_recipe(), CachedItems(data_of(caches[dtype]))
    family = load_family(picture_recipe.teacher, 80, False)
    losses = []
    for source, null in ((0, items.null), (1, encode_null(family))):
        network = tiny_network(caption_channels=TEXT_WIDTH)
        arguments = recipe, engine, network, null
        made = AdaptStage(*arguments) if stage == "adapt" else DistillStage(*arguments, LATENT)
        for step in range(2):
            batch = both_batches(picture_recipe, caches[dtype], range(8 * step, 8 * step + 8))[source]
            losses.append(made.update(step, batch).read(engine)["loss"])
    cached, online = losses[:2], losses[2:]
    encoders = of_network(family.autoencoder.encoder, family.text_encoder)
    update = encoders + of_network(network, passes=4) + STORED[dtype]
    assert cached == growing(online, update)
    assert cached[0] != cached[1] and (dtype == "fp32" or cached != online)


def test_null_is_the_family_s_own(picture_recipe, caches):
    family = load_family(picture_recipe.teacher, 80, False)
    text, mask = encode_null(family)
    for dtype, stored in STORED.items():
        items = CachedItems(data_of(caches[dtype]))
        assert items.null[0].shape == (1, 80, TEXT_WIDTH) and torch.equal(items.null[1], mask)
        assert_close(items.null[0], text, of_network(family.text_encoder) + stored)
        assert (
            (items.latent_shape, items.text_width) == (LATENT, TEXT_WIDTH)
            and len(items) == COUNT
            and not items.in_order
        )
        stored = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        assert {x.dtype for x in flat(items.item(0, ANY)).values()} == {stored} and items.null[
            0
        ].dtype == torch.float32


def test_reading_loads_no_library_that_has_networks(caches):
    """`collate` is given tensors alone; all that a batch needs comes from here."""
    program = f"""
import sys
from sprint.data.cache.items import CachedItems
from sprint.recipe.schema import Data, DataKind
items = CachedItems(Data(kind=DataKind.cache, path={str(caches["bf16"])!r}, size={SIZE}))
encoded = [items.item(k, None) for k in range(len(items))]
print(len(encoded), items.latent_shape, items.null[0].shape[1], {{"diffusers", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{COUNT} {LATENT} 80 set()\n", done.stderr


# ---- the format ---------------------------------------------------------------------------------------


def test_shards_are_plain_tars_that_others_can_read(caches, pictures):
    folder = caches["bf16"]
    names = {path.name for path in folder.iterdir() if path.name[0] != "."}
    tars = [f"{n:06d}.tar" for n in range(3)]
    assert names == {CACHE, NULL, *tars, *(name.replace(".tar", ".json") for name in tars)}
    found = []
    for name in tars:
        with tarfile.open(folder / name) as tar:
            for entry in tar:
                assert (entry.mtime, entry.uid, entry.gid, entry.uname) == (0, 0, 0, "")
                found.append(entry.name)
                content = tar.extractfile(entry).read()
                if entry.name == "000000004.json":
                    prompt = (pictures / "4.txt").read_text()
                    about = {"index": 4, "prompt": prompt, "height": SIZE, "width": SIZE}
                    assert json.loads(content) == about
                if entry.name == "000000004.safetensors":
                    tensors = safetensors.torch.load(content)
                    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
                    assert tensors["latent"].shape == LATENT
                    # one a byte, and this is what spaces become
                    tokens = len(prompt.replace(" ", "▁").encode())
                    assert tensors["text"].shape == (tokens, TEXT_WIDTH)
    assert found == [f"{k:09d}.{suffix}" for k in range(COUNT) for suffix in ("json", "safetensors")]


def test_records_say_what_is_there(caches):
    folder = caches["bf16"]
    listed = json.loads((folder / CACHE).read_text())["files"]
    assert [file["name"] for file in listed] == [NULL, "000000.tar", "000001.tar", "000002.tar"]
    for number, file in enumerate(listed[1:]):
        content, record = (folder / file["name"]).read_bytes(), read_record(folder, number)
        assert record.bytes == file["bytes"] == len(content)
        assert record.sha256 == file["sha256"] == hashlib.sha256(content).hexdigest()
        assert (record.first, record.samples, record.skipped) == (3 * number, [3, 3, 1][number], [])


# ---- what is refused ----------------------------------------------------------------------------------


def edit(folder: Path, group: str = "", **changes) -> None:
    """Change keys of cache.json, or of a group in it."""
    content = json.loads((folder / CACHE).read_text())
    (content[group] if group else content).update(changes)
    (folder / CACHE).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "000001.tar").unlink(), r"000001\.tar: missing"),
        (lambda f: (f / "000001.tar").write_bytes(b"x"), r"000001\.tar: 1 bytes, 10240 in cache\.json"),
        (lambda f: (f / NULL).unlink(), "null.safetensors: missing"),
        (
            lambda f: shutil.copy(f / "000001.tar", f / "again.tar"),
            "10 samples in its shards, 7 in cache.json",
        ),
        (lambda f: (f / CACHE).write_text("{"), "cache.json is not valid JSON: .*; make the cache anew"),
        (
            lambda f: (f / CACHE).write_text("[" * 100_000),
            "cache.json is not valid JSON: .*; make the cache anew",
        ),
        (lambda f: (f / CACHE).write_text("[]"), "cache.json is not a JSON object"),
        (lambda f: (f / CACHE).write_text("{}"), r"cache.json: family: Field required; make the cache anew"),
        (
            lambda f: edit(f, "settings", data=5),
            r"cache.json: data: Input should be a valid dictionary \(it is 5\)",
        ),
        (lambda f: edit(f, files=[{}]), "cache.json: files: 0.name: Field required"),
        (
            lambda f: edit(f, files=[{"name": "/dev/zero", "bytes": 0, "sha256": ""}]),
            "is not a file of the cache",
        ),
        (lambda f: edit(f, "settings", samples=10**15), "cache.json: samples: Input should be less"),
        (
            lambda f: edit(f, "settings", shard_size=0),
            "cache.json: shard_size: Input should be greater than 0",
        ),
        (lambda f: (f / CACHE).unlink(), "no cache.json there"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_damaged_cache_is_refused_when_it_is_opened(copied, harm, words):
    if "10240" in words:
        words = words.replace("10240", str((copied / "000001.tar").stat().st_size))
    harm(copied)
    with pytest.raises(SprintError, match=words):
        CachedItems(data_of(copied))


@pytest.mark.parametrize(
    ("dtype", "words"), [(torch.float8_e4m3fn, "float8_e4m3fn"), (torch.int64, "int64"), (torch.bool, "bool")]
)
def test_latents_of_other_numbers_are_bad_samples(tmp_path, copied, dtype, words):
    (copied / "000001.tar").unlink()
    write_shard(copied, 1, 3, [Entry(k, "a dot", SIZE, SIZE, encoded()) for k in range(3, 6)], dtype)
    shard = copied / "000001.tar"
    files = json.loads((copied / CACHE).read_text())["files"]
    edit(copied, files=[f | {"bytes": shard.stat().st_size} if f["name"] == shard.name else f for f in files])
    items = CachedItems(data_of(copied))
    with pytest.raises(BadSample, match=rf"unreadable latent: numbers of torch\.{words}"):
        items._encoded(3)


@pytest.mark.parametrize(
    "content",
    [b"{}", b"[]", b'{"bytes": "x", "sha256": "", "samples": 1, "first": 0, "skipped": []}', b"[" * 10**5],
)
def test_a_damaged_record_is_no_record(copied, content):
    (copied / "000001.json").write_bytes(content)
    with pytest.raises(SprintError, match=r"000001\.json: missing or damaged"):
        read_record(copied, 1)


def test_a_later_format_is_refused(copied):
    edit(copied, "settings", format=2)
    with pytest.raises(SprintError, match="format 2 of another version of sprint; this reads 1"):
        CachedItems(data_of(copied))


def test_verify_names_the_damaged_file(copied):
    names = [NULL, "000000.tar", "000001.tar", "000002.tar"]
    records = [f"{number:06d}.json" for number in range(3)]
    assert list(verify(copied)) == [copied / name for name in names + records]
    second = [copied / "000000.tar", copied / "000000.json"]  # of three processes the second's share
    assert list(verify(copied, 1, 3)) == second
    content = bytearray((copied / "000001.tar").read_bytes())
    content[1000] ^= 1
    (copied / "000001.tar").write_bytes(content)
    CachedItems(data_of(copied))  # sizes alone do not tell
    seen = verify(copied)
    assert [next(seen).name, next(seen).name] == names[:2]
    with pytest.raises(SprintError, match=r"000001\.tar: damaged"):
        next(seen)


def test_a_damaged_header_hides_no_samples(copied):
    content = bytearray((copied / "000001.tar").read_bytes())
    content[150] ^= 1  # its checksum: what comes after cannot be found
    (copied / "000001.tar").write_bytes(content)
    with pytest.raises(SprintError, match=r"4 samples in its shards, 7 in cache\.json"):
        CachedItems(data_of(copied))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 32}, "data.size = 32, there 16"),
        ({"aspect_buckets": True}, "data.aspect_buckets = True, there False"),
    ],
)
def test_pictures_of_another_size_are_refused(caches, change, words):
    with pytest.raises(SprintError, match=words):
        CachedItems(data_of(caches["bf16"], **change))


def test_another_text_side_is_refused(picture_recipe, caches, tmp_path, caplog):
    items, family = CachedItems(data_of(caches["bf16"])), picture_recipe.teacher
    items.check(family, Text(80, False))
    moved = shutil.copytree(family, tmp_path / "moved")
    items.check(str(moved), Text(80, False))  # the same weights by another name
    assert not caplog.records
    with pytest.raises(
        SprintError, match=r"text.instruction = True, there False, text.max_length = 40, there 80"
    ):
        items.check(family, Text(40, True))
    with pytest.raises(SprintError, match="other weights in text_encoder and vae of tiny than made it"):
        items.check("tiny", Text(80, False))
    with pytest.raises(SprintError, match="family = nobody/nothing, there"):
        items.check("nobody/nothing", Text(80, False))


def test_weights_that_are_gone_are_compared_by_name(caches, monkeypatch, caplog):
    items = CachedItems(data_of(caches["bf16"]))
    monkeypatch.setattr(cache, "family_weights", lambda name: None)
    items.check(items.settings.family, Text(80, False))
    assert "by name only" in caplog.text


def test_hashes_are_of_what_is_loaded_by_default(tmp_path):
    for part in ("text_encoder", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(b"weights")
    before = family_weights(str(tmp_path))
    (tmp_path / "vae" / "model.fp16.safetensors").write_bytes(b"a variant")
    assert family_weights(str(tmp_path)) == before
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"others")
    after = family_weights(str(tmp_path))
    assert after["vae"] != before["vae"] and after["text_encoder"] == before["text_encoder"]
    shutil.rmtree(tmp_path / "vae")
    assert family_weights(str(tmp_path)) is None


# ---- bad samples --------------------------------------------------------------------------------------


def one_sample(folder: Path, caches, tensors: bytes) -> CachedItems:
    """A cache whose one sample holds these bytes."""
    write_shard(folder, 0, 0, [Entry(0, "a dot", SIZE, SIZE, encoded())], torch.float32)
    (folder / "000000.tar").unlink()
    with tarfile.open(folder / "000000.tar", "w") as tar:
        (folder / "content").write_bytes(tensors)
        tar.add(folder / "content", "000000000.safetensors")
    shutil.copy(caches["fp32"] / NULL, folder)
    content = json.loads((caches["fp32"] / CACHE).read_text())
    files = [folder / NULL, folder / "000000.tar"]
    content["files"] = [{"name": f.name, "bytes": f.stat().st_size, "sha256": ""} for f in files]
    (folder / CACHE).write_text(json.dumps(content | {"samples": 1}))
    return CachedItems(data_of(folder))


@pytest.mark.parametrize(
    ("latent", "text", "reason"),
    [
        (torch.full(LATENT, torch.nan), torch.zeros(3, TEXT_WIDTH), "NaN latent"),
        (torch.zeros(LATENT), torch.full((3, TEXT_WIDTH), torch.inf), "NaN text"),
        (torch.zeros(LATENT[1:]), torch.zeros(3, TEXT_WIDTH), "wrong size"),
        (torch.zeros(CHANNELS, 4, 0), torch.zeros(3, TEXT_WIDTH), "wrong size"),
        (torch.zeros(LATENT), torch.zeros(3, 0), "wrong size"),
    ],
)
def test_samples_that_are_not_what_they_should_be_are_bad(tmp_path, caches, latent, text, reason):
    items = one_sample(tmp_path, caches, safetensors.torch.save({"latent": latent, "text": text}))
    with pytest.raises(BadSample) as bad:
        items.item(0, ANY)
    assert (bad.value.reason, bad.value.where) == (reason, "000000.tar: 000000000")
    with pytest.raises(SprintError, match="none of its samples can be read"):
        _ = items.latent_shape


@pytest.mark.parametrize("content", [b"no tensors", safetensors.torch.save({"latent": torch.zeros(LATENT)})])
def test_bytes_that_are_no_tensors_are_a_bad_sample(tmp_path, caches, content):
    with pytest.raises(BadSample) as bad:
        one_sample(tmp_path, caches, content).item(0, ANY)
    assert bad.value.reason == "unreadable latent"


def rewritten(caches, monkeypatch, **contents: bytes) -> CachedItems:
    """A cache whose second sample has other members."""
    items = CachedItems(data_of(caches["fp32"]))
    read = items._tar.read
    changed = lambda index, suffixes: contents if index == 1 else read(index, suffixes)  # noqa: E731
    monkeypatch.setattr(items._tar, "read", changed)
    return items


@pytest.mark.parametrize(("channels", "width"), [(CHANNELS, TEXT_WIDTH - 1), (CHANNELS + 1, TEXT_WIDTH)])
def test_samples_are_as_the_first_is(caches, monkeypatch, channels, width):
    tensors = {"latent": torch.zeros(channels, *LATENT[1:]), "text": torch.zeros(3, width)}
    items = rewritten(caches, monkeypatch, safetensors=safetensors.torch.save(tensors))
    words = f"wrong size: {channels} channels and text of {width}, but the first sample has {CHANNELS} and"
    with pytest.raises(BadSample, match=words):
        items.item(1, ANY)
    assert items.item(2, ANY).text.shape[1] == TEXT_WIDTH


@pytest.mark.parametrize(
    "about",
    [
        '{"height": 0, "width": 16}',
        '{"height": 16, "width": -1}',
        '{"height": 16}',
        '{"height": 1e999, "width": 1}',
        "[" * 100_000,
    ],
)
def test_a_size_that_cannot_be_is_a_bad_sample(caches, monkeypatch, about):
    items = rewritten(caches, monkeypatch, json=about.encode())
    with pytest.raises(BadSample, match="wrong size"):
        items.size(1)
    assert items.size(2) == (SIZE, SIZE)


def test_the_fingerprint_is_of_the_shards_index(caches, copied):
    """Not of how the numbers are stored, nor of where the folder is."""
    assert CachedItems(data_of(copied)).fingerprint == CachedItems(data_of(caches["bf16"])).fingerprint


def test_captions_are_kept_for_those_who_ask(caches, pictures):
    items = CachedItems(data_of(caches["fp32"]))
    captions = {items.caption(index, np.random.default_rng(0)) for index in range(len(items))}
    assert captions and captions <= {file.read_text().strip() for file in pictures.rglob("*.txt")}


@pytest.mark.parametrize(
    ("about", "reason"),
    [(b"{", "unreadable"), (b'{"prompt": 3}', "unreadable"), (b'{"prompt": " "}', "empty"), (b"", "unread")],
)
def test_a_caption_that_is_none_is_said(caches, monkeypatch, about, reason):
    items = CachedItems(data_of(caches["fp32"]))
    monkeypatch.setattr(items, "_about", lambda index: about)
    with pytest.raises(BadSample, match=reason):
        items.caption(0, np.random.default_rng(0))
