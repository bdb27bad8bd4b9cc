"""Sources by position, the folder of pictures, every wrong input, encoding, and the prefetcher."""

import errno
import io
import os
import re
import struct
import threading
import time
import zlib
from contextlib import closing

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from sprint.data.folder import FolderSource, read_caption, read_picture, to_rgb
from sprint.data.scenes import scene
from sprint.data.source import (
    HELD_OUT_SEED,
    TRAINING_SEED,
    Sample,
    SceneSource,
    batch_positions,
    encode,
    open_source,
    prefetch,
)
from sprint.errors import SprintError
from sprint.models.family import Family, encode_null
from sprint.recipe import Data, DataKind

WORDS = ("red", "green", "blue", "circle", "square", "triangle", "cross", "a", "and")


def write_pair(folder, name, color=(10, 20, 30), caption=None, size=(8, 8)):
    """NAME.png of one colour and NAME.txt."""
    picture = folder / f"{name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(picture)
    (folder / f"{name}.txt").write_text(caption or f"caption {name}")
    return picture


@pytest.fixture
def folder(tmp_path):
    """Seven pairs, one of them two folders down."""
    for k in range(6):
        write_pair(tmp_path, f"p{k}", color=(k, k, k))
    write_pair(tmp_path, "deep/er/p6", color=(6, 6, 6))
    return tmp_path


def equal(a: list[Sample], b: list[Sample]) -> bool:
    return [s.caption for s in a] == [s.caption for s in b] and all(
        np.array_equal(x.picture, y.picture) for x, y in zip(a, b, strict=True)
    )


# Positions


@pytest.mark.parametrize("kind", ["scenes", "folder"])
def test_samples_depend_on_the_position_alone(kind, folder):
    def source():
        return SceneSource(5) if kind == "scenes" else FolderSource(folder, 8, seed=5)

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
    with pytest.raises(SprintError, match=r"^batch_size = 10 cannot be shared evenly by 4 processes$"):
        batch_positions(0, 10, 0, 4)


# Scenes


def test_scene_samples_are_64_pixel_pictures_with_captions():
    for sample in SceneSource().samples(range(6)):
        assert sample.picture.shape == (64, 64, 3) and sample.picture.dtype == np.uint8
        assert 3 < len(sample.caption) < 80


def test_training_series_are_never_the_held_out_one():
    assert SceneSource(4).samples(range(3, 4))[0].caption == scene(TRAINING_SEED + 4, 3).caption
    assert HELD_OUT_SEED == 2000 and TRAINING_SEED + 0 > HELD_OUT_SEED  # and seeds only go up
    held_out = {scene(HELD_OUT_SEED, i).things for i in range(600)}
    assert len(held_out) == 600
    for seed in (0, 1):
        assert held_out.isdisjoint(scene(TRAINING_SEED + seed, i).things for i in range(600))
    with pytest.raises(SprintError, match=r"^data.seed = -1000, but it must be at least 0$"):
        SceneSource(TRAINING_SEED - 4000)


def test_seeds_give_different_scenes():
    assert not equal(SceneSource(0).samples(range(3)), SceneSource(1).samples(range(3)))


def test_open_source_follows_the_recipe(folder):
    assert open_source(Data(kind=DataKind.scenes, size=64, seed=9)) == SceneSource(9)
    source = open_source(Data(kind=DataKind.folder, path=str(folder), size=16, seed=3))
    assert equal(source.samples(range(7)), FolderSource(folder, 16, seed=3).samples(range(7)))
    assert source.samples(range(1))[0].picture.shape == (16, 16, 3)


# The folder: order, geometry, colours


def test_every_epoch_shows_every_picture_once_in_an_order_of_its_own(folder):
    source = FolderSource(folder, 8, seed=1)
    assert len(source) == 7
    samples = source.samples(range(7 * 20))
    assert all(s.caption.endswith(f"p{s.picture[0, 0, 0]}") for s in samples)
    epochs = [tuple(s.picture[0, 0, 0] for s in samples[7 * e : 7 * e + 7]) for e in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 15
    other = FolderSource(folder, 8, seed=2).samples(range(7 * 20))
    assert [s.caption for s in other] != [s.caption for s in samples]


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".webp"])
def test_every_kind_of_picture_is_found_and_read(tmp_path, suffix):
    Image.new("RGB", (20, 20), (200, 100, 50)).save(tmp_path / f"a.b{suffix}", quality=95)
    (tmp_path / "a.b.txt").write_text("\ufeff  two words \n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a caption")
    (tmp_path / "._a.png").write_text("hidden")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.png").write_text("hidden")
    (sample,) = FolderSource(tmp_path, 8).samples(range(1))
    assert sample.caption == "two words"
    assert abs(sample.picture.astype(int) - (200, 100, 50)).max() <= 3


def test_the_middle_square_survives_and_the_shorter_side_fills_it(tmp_path):
    """A 96×48 picture: columns 24 to 72 remain. Quarters of the square differ in colour; the rest is red."""
    marks = np.zeros((48, 96, 3), np.uint8)
    marks[..., 0] = 255
    marks[:24, 24:48], marks[:24, 48:72] = (0, 255, 0), (0, 0, 255)
    marks[24:, 24:48], marks[24:, 48:72] = (0, 0, 0), (255, 255, 255)
    corners = {(3, 3): (0, 255, 0), (3, 12): (0, 0, 255), (12, 3): (0, 0, 0), (12, 12): (255, 255, 255)}
    for name, turn in (("wide", (0, 1, 2)), ("tall", (1, 0, 2))):
        file = tmp_path / f"{name}.png"
        Image.fromarray(np.ascontiguousarray(marks.transpose(turn))).save(file)
        assert np.array_equal(read_picture(str(file), 48).transpose(turn), marks[:, 24:72])
        out = read_picture(str(file), 16).transpose(turn)
        assert out.shape == (16, 16, 3)
        assert {at: tuple(out[at]) for at in corners} == corners
        assert out[:, 1, 0].max() <= 30  # the left edge takes no more red than half a kernel's lobe


def test_odd_margins_are_split_evenly(tmp_path):
    """9×4 to 4: two and a half columns go on each side, so a ramp of 10 a column keeps its mean at 40."""
    ramp = np.broadcast_to(np.arange(9, dtype=np.uint8)[None, :, None] * 10, (4, 9, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "a.png")
    assert read_picture(str(tmp_path / "a.png"), 4)[..., 0].mean() == pytest.approx(40, abs=0.5)


def test_downsampling_is_antialiased(tmp_path):
    """One-pixel stripes of 0 and 255 become grey, not stripes."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    out = read_picture(str(tmp_path / "a.png"), 8)
    assert abs(out[:, 1:-1].astype(int) - 127.5).max() < 3


def test_small_pictures_are_enlarged(tmp_path):
    Image.new("RGB", (3, 5), (9, 8, 7)).save(tmp_path / "a.png")
    out = read_picture(str(tmp_path / "a.png"), 32)
    assert out.shape == (32, 32, 3) and np.unique(out.reshape(-1, 3), axis=0).tolist() == [[9, 8, 7]]


def palette_with_hole():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([1, 2, 3, 40, 50, 60])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "color"),
    [
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (200, 0, 0, 255)), (200, 0, 0)),
        (Image.new("RGBA", (2, 2), (200, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (200, 0, 0, 51)), (244, 204, 204)),  # 0.2 · red + 0.8 · white
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (palette_with_hole(), (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 0x8000, np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((2, 2), 65535, np.int32)), (255, 255, 255)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(image, color):
    out = to_rgb(image)
    assert out.mode == "RGB"
    assert abs(np.asarray(out).astype(int) - color).max() <= 1


def test_16_bit_grey_survives_the_file(tmp_path):
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(str(tmp_path / "a.png"), 4), np.full((4, 4, 3), 100))


def test_exif_orientation_is_applied(tmp_path):
    """Orientation 6: stored on its side, shown after a quarter turn clockwise."""
    stored = np.zeros((4, 4, 3), np.uint8)
    stored[0, 0] = 255  # top left goes to the top right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    out = read_picture(str(tmp_path / "a.png"), 4)
    assert np.argwhere(out[..., 0]).tolist() == [[0, 3]]


# The folder: wrong input


def refusal(path, size=8):
    with pytest.raises(SprintError) as caught:
        FolderSource(path, size)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_folder(tmp_path):
    assert refusal(tmp_path / "no").startswith(f"{tmp_path / 'no'}: no such folder; set data.path")


def test_a_file_is_no_folder(tmp_path):
    file = write_pair(tmp_path, "a")
    assert refusal(file).startswith(f"{file}: not a folder; set data.path")


def test_folder_without_pictures(tmp_path):
    (tmp_path / "a.txt").write_text("alone")
    assert refusal(tmp_path).startswith(f"{tmp_path}: no pictures there; expected NAME.jpg, .png or .webp")


def test_pictures_without_captions_are_counted_and_the_first_is_named(folder):
    (folder / "p4.txt").unlink()
    (folder / "deep/er/p6.txt").unlink()
    assert refusal(folder).startswith(f"{folder}/deep/er/p6.png: picture without caption (2 of 7)")


def test_captions_without_pictures_are_counted_and_the_first_is_named(folder):
    (folder / "p2.png").unlink()
    (folder / "p5.png").unlink()
    assert refusal(folder).startswith(f"{folder}/p2.txt: caption without picture (2 of 7)")


def test_two_pictures_of_one_name(folder):
    Image.new("RGB", (4, 4)).save(folder / "p1.jpg")
    assert refusal(folder) == f"{folder}/p1.png: {folder}/p1.jpg has the same name; keep one of them"


def test_unreadable_subfolder(folder, monkeypatch):
    scandir = os.scandir

    def refuse_deep(path):
        if os.path.basename(path) == "deep":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_deep)
    assert refusal(folder) == f"{folder}/deep: cannot be read: Permission denied"


def test_empty_and_broken_captions(tmp_path):
    file = tmp_path / "a.txt"
    for content, problem in ((b" \n\t", "empty caption"), (b"caf\xe9", "unreadable caption")):
        file.write_bytes(content)
        with pytest.raises(SprintError, match=f"^{re.escape(str(file))}: {problem}"):
            read_caption(str(file))


def png_of_claimed_size(width, height):
    """A PNG whose header claims a size that its data does not have."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def noise_bytes(form, **options):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "cannot identify image file"),
        (b"<html>not found</html>", "cannot identify image file"),
        (noise_bytes("JPEG")[:1500], "truncated"),
        (noise_bytes("PNG")[:3000], "truncated"),
        (noise_bytes("WEBP")[:1500], "could not create decoder"),
        (noise_bytes("BMP"), "cannot identify image file"),  # whatever its name says
        (png_of_claimed_size(30000, 30000), "decompression bomb"),
    ],
)
def test_unreadable_pictures_are_named(tmp_path, content, problem):
    file = write_pair(tmp_path, "a")
    file.write_bytes(content)
    source = FolderSource(tmp_path, 8)
    with pytest.raises(SprintError, match=problem) as caught:
        source.samples(range(1))
    assert str(caught.value).startswith(f"{file}: unreadable picture: ")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on broken EXIF
def test_damaged_files_raise_nothing_else(tmp_path):
    """Random bytes overwritten in 300 files: each is read, or refused in one line."""
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [noise_bytes(form, exif=exif) for form in ("JPEG", "PNG", "WEBP")]
    file, refused = tmp_path / "a.png", 0
    for k in range(300):
        content = bytearray(whole[k % 3])
        for place in rng.integers(0, 400, 4):
            content[place] = rng.integers(256)
        file.write_bytes(content)
        try:
            assert read_picture(str(file), 8).shape == (8, 8, 3)
        except SprintError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 30 < refused < 300


# Encoding


@pytest.fixture(scope="module")
def family():
    """Random weights in the real classes: 4× autoencoder with 4 channels, width-16 text encoder."""
    torch.manual_seed(0)
    autoencoder = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.25,
    )
    words = {word: k for k, word in enumerate(["<pad>", "<bos>", "<unk>", *WORDS])}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>"
    )
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Family(tokenizer, Gemma2Model(config).eval(), autoencoder.eval(), max_length=8, instruction=False)


def pictures_of(*levels, size=16):
    return [Sample(np.full((size, size, 3), level, np.uint8), "a red circle") for level in levels]


def test_encode_scales_the_encoding_of_pictures_between_minus_one_and_one(family):
    seen = []
    hook = family.autoencoder.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = encode(pictures_of(0, 51, 255), family)
    hook.remove()
    expected = torch.tensor([-1.0, -0.6, 1.0]).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    torch.testing.assert_close(seen[0], expected)
    with torch.no_grad():
        latent = family.autoencoder.encode(expected.contiguous()).latent
    assert batch.latent.shape == (3, 4, 4, 4) and latent.std() > 1e-3
    torch.testing.assert_close(batch.latent, 0.25 * latent)


def test_encode_keeps_rows_columns_and_channels(family):
    """A picture that differs everywhere meets the encoder as [channel, row, column]."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    seen = []
    hook = family.autoencoder.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encode([Sample(picture, "a")], family)
    hook.remove()
    assert seen[0][0, 2, 5, 1].item() == pytest.approx(picture[5, 1, 2] / 127.5 - 1, abs=1e-6)


def test_encode_gives_text_mask_and_no_graph(family):
    samples = [
        Sample(s.picture, c) for s, c in zip(pictures_of(1, 2), ("a Red circle", "cross"), strict=True)
    ]
    batch = encode(samples, family)
    assert batch.text.shape == (2, 8, 16)
    assert batch.mask.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert not any(tensor.requires_grad for tensor in batch)
    alone = encode(samples[1:], family)
    for both, one in zip(batch, alone, strict=True):
        torch.testing.assert_close(both[1:], one)


def test_sizes_that_do_not_divide_are_refused(family):
    with pytest.raises(
        SprintError, match=r"^data.size = 18, but this autoencoder takes multiples of 4 pixels$"
    ):
        encode(pictures_of(0, size=18), family)


def test_the_null_prompt_is_the_empty_one_without_instruction(family):
    text, mask = encode_null(family)
    assert text.shape == (1, 8, 16) and mask.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]
    family.instruction = True
    try:
        behind, _ = family.encode_prompts([""])
        again, _ = encode_null(family)
    finally:
        family.instruction = False
    torch.testing.assert_close(again, text)
    assert (behind - text).abs().max() > 1e-2


# Prefetching


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_gives_every_step_in_order_from_one_other_thread():
    made = []

    def make(step):
        time.sleep(0.002 * (step % 3))
        made.append(threading.get_ident())
        return step**2

    assert list(prefetch(make, 3, 12)) == [k**2 for k in range(3, 12)]
    assert len(set(made)) == 1 and made[0] != threading.get_ident()
    assert prefetch_threads() == []
    assert list(prefetch(make, 5, 5)) == []


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_prefetch_works_ahead_but_no_further_than_depth(depth):
    made, full = [], threading.Event()

    def make(step):
        made.append(step)
        if step == depth:
            full.set()
        return step

    with closing(prefetch(make, 0, 100, depth)) as batches:
        assert next(batches) == 0
        assert full.wait(5)  # steps 1 … depth were made while step 0 was in use
        time.sleep(0.02)
        assert made == list(range(depth + 1))


def test_prefetch_raises_in_turn_and_ends():
    made = []

    def make(step):
        made.append(step)
        if step == 3:
            raise SprintError("p3.png: unreadable picture")
        return step

    got = []
    with pytest.raises(SprintError, match=r"^p3.png: unreadable picture$"):
        for step in prefetch(make, 0, 100):
            got.append(step)
    assert got == [0, 1, 2]
    assert len(made) <= 6
    assert prefetch_threads() == []


@pytest.mark.parametrize("ending", [RuntimeError, KeyboardInterrupt, None])
def test_prefetch_stops_with_its_consumer(ending):
    made = []

    def consume():
        with closing(prefetch(lambda step: made.append(step) or step, 0, 10**9)) as batches:
            for step in batches:
                if step == 4:
                    if ending is None:
                        return
                    raise ending

    if ending is None:
        consume()
    else:
        with pytest.raises(ending):
            consume()
    assert prefetch_threads() == []
    assert len(made) <= 7
