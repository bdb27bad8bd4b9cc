"""Pictures: geometry, colours, sizes by the header, and every kind of damage."""

import io
import os
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, features

from sprint.data.items import BadSample
from sprint.data.pictures import (
    DECODERS,
    FORMATS,
    LARGEST,
    header_from,
    nearest,
    picture_from,
    size_from,
    to_rgb,
)
from tests.data.picture_files import noise_bytes, png_of_claimed_size


def square(file, size):
    return picture_from(file, [(size, size)], str(file))


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
        assert np.array_equal(square(file, 48).transpose(turn), marks[:, 24:72])
        out = square(file, 16).transpose(turn)
        assert out.shape == (16, 16, 3)
        assert {at: tuple(out[at]) for at in corners} == corners
        assert out[:, 1, 0].max() <= 30  # the left edge takes no more red than half a kernel's lobe


def test_odd_margins_are_split_evenly(tmp_path):
    """9×4 to 4: two and a half columns go on each side, so a ramp of 10 a column keeps its mean at 40."""
    ramp = np.broadcast_to(np.arange(9, dtype=np.uint8)[None, :, None] * 10, (4, 9, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "a.png")
    assert square(tmp_path / "a.png", 4)[..., 0].mean() == pytest.approx(40, abs=0.5)


def test_downsampling_is_antialiased(tmp_path):
    """One-pixel stripes of 0 and 255 become grey, not stripes."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    out = square(tmp_path / "a.png", 8)
    assert abs(out[:, 1:-1].astype(int) - 127.5).max() < 3


def test_small_pictures_are_enlarged(tmp_path):
    Image.new("RGB", (3, 5), (9, 8, 7)).save(tmp_path / "a.png")
    out = square(tmp_path / "a.png", 32)
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
    assert np.array_equal(square(tmp_path / "a.png", 4), np.full((4, 4, 3), 100))


def test_exif_orientation_is_applied(tmp_path):
    """Orientation 6: stored on its side, shown after a quarter turn clockwise."""
    stored = np.zeros((4, 4, 3), np.uint8)
    stored[0, 0] = 255  # top left goes to the top right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    out = square(tmp_path / "a.png", 4)
    assert np.argwhere(out[..., 0]).tolist() == [[0, 3]]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_is_that_of_the_upright_picture_for_bytes_and_paths(tmp_path, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / "a", form, exif=exif)
    upright = (30, 20) if orientation in (6, 8) else (20, 30)
    assert size_from(tmp_path / "a", "a") == upright
    with Image.open(tmp_path / "a") as image:
        assert to_rgb(image).size == upright[::-1]
    assert size_from(io.BytesIO((tmp_path / "a").read_bytes()), "a") == upright


def test_the_size_needs_no_more_than_the_header():
    for form in ("PNG", "JPEG"):  # Pillow reads a WebP whole, but decodes it later
        assert size_from(io.BytesIO(noise_bytes(form)[:1000]), "cut short") == (64, 64)


def test_bytes_and_paths_give_one_picture_of_the_nearest_shape(tmp_path):
    Image.effect_noise((60, 20), 50).convert("RGB").save(tmp_path / "a.png")
    shapes = [(32, 32), (16, 48), (48, 16)]
    picture = picture_from(str(tmp_path / "a.png"), shapes, "a")
    assert picture.shape == (16, 48, 3) and picture.dtype == np.uint8
    again = picture_from(io.BytesIO((tmp_path / "a.png").read_bytes()), shapes, "a")
    assert np.array_equal(picture, again)


def test_the_nearest_shape_is_the_one_of_nearest_height_over_width():
    shapes = [(2, 1), (1, 1), (1, 2)]
    assert [nearest(shapes, size) for size in ((7, 4), (7, 5), (4, 7), (1, 9))] == [
        *((2, 1), (1, 1), (1, 2), (1, 2)),
    ]


# Damage


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (b"", "unreadable picture", "none of JPEG, PNG"),
        (b"<html>not found</html>", "unreadable picture", "none of JPEG, PNG"),
        (noise_bytes("JPEG")[:1500], "unreadable picture", "truncated"),
        (noise_bytes("PNG")[:3000], "unreadable picture", "truncated"),
        (noise_bytes("WEBP")[:1500], "unreadable picture", "could not create decoder"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable picture", "none of JPEG, PNG"),
        (png_of_claimed_size(30000, 30000), "picture too large", "decompression bomb"),
        (png_of_claimed_size(LARGEST // 1024 + 1, 1024), "picture too large", "65537×1024 pixels"),
    ],
)
def test_unreadable_pictures_are_named_with_the_reason(content, reason, detail):
    with pytest.raises(BadSample) as caught:
        square(io.BytesIO(content), 8)
    assert caught.value.reason == reason and detail in caught.value.detail

    with pytest.raises(BadSample) as caught:
        picture_from(io.BytesIO(content), [(8, 8)], "x.tar: a/b")
    assert str(caught.value).startswith(f"x.tar: a/b: {reason}: ") and "\n" not in str(caught.value)


def test_a_picture_that_is_not_there(tmp_path):
    with pytest.raises(BadSample, match=r"a.png: unreadable picture: No such file or directory$"):
        square(tmp_path / "a.png", 8)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on broken EXIF
def test_damaged_files_raise_nothing_else():
    """Random bytes overwritten in 300 files: each is read, or refused in one line; the size alone too."""
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [noise_bytes(form, exif=exif) for form in ("JPEG", "PNG", "WEBP")]
    refused = 0
    for k in range(300):
        content = bytearray(whole[k % 3])
        for place in rng.integers(0, 400, 4):
            content[place] = rng.integers(256)
        try:
            assert square(io.BytesIO(content), 8).shape == (8, 8, 3)
        except BadSample as bad:
            refused += 1
            assert "\n" not in str(bad)
        with suppress(BadSample):
            size_from(io.BytesIO(content), "a")
    assert 30 < refused < 300


def tiff(orientation=6, words=(b"maker", b"model")) -> bytes:
    """EXIF of a few tags, one of them a fraction."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0110], exif[0x011A] = orientation, *words, 72.0
    exif.get_ifd(0x8769)[0x829A] = (1, 30)
    return exif.tobytes()


def with_exif(form: str, exif: bytes) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (30, 20), (9, 8, 7)).save(stream, form, exif=exif, lossless=True)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_no_harm(form):
    """The bytes between the first and the last of EXIF are anything: the picture is whole, upright or not."""
    rng = np.random.default_rng(2)
    whole, turned = tiff(), 0
    for _ in range(300):
        exif = bytearray(whole)
        for place in rng.integers(len(b"Exif\0\0II*\0"), len(exif), 3):
            exif[place] = rng.choice([0, 1, 2, 3, 5, 9, 10, 12, 255])
        content = with_exif(form, bytes(exif))
        size = size_from(io.BytesIO(content), "a")
        turned += size == (30, 20)
        assert size in ((30, 20), (20, 30))
        assert picture_from(io.BytesIO(content), [size], "a").shape == (*size, 3)
        with Image.open(io.BytesIO(content)) as image:
            assert to_rgb(image).size == size[::-1]  # both read one orientation
    assert 30 < turned < 300


def test_a_picture_whose_exif_cannot_be_read_is_taken_as_it_is_stored(monkeypatch):
    def fail(image):
        raise TypeError("no tag")

    content = with_exif("PNG", tiff())
    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert size_from(io.BytesIO(content), "a") == (20, 30)
    assert picture_from(io.BytesIO(content), [(20, 30)], "a").shape == (20, 30, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation):
    stored = Image.fromarray(np.random.default_rng(3).integers(0, 256, (4, 6, 3), np.uint8))
    stream = io.BytesIO()
    stored.save(stream, "PNG", exif=tiff(orientation))
    with Image.open(stream) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    with Image.open(stream) as image:
        assert np.array_equal(to_rgb(image), expected)


def test_whatever_a_decoder_raises_is_a_bad_sample(monkeypatch):
    content = io.BytesIO(noise_bytes("PNG"))

    def fail(image):
        raise AttributeError("no such thing")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(BadSample, match=r"^a: unreadable picture: no such thing$"):
        picture_from(content, [(8, 8)], "a")


# Formats


def everywhere(form: str, **options) -> bytes:
    """A picture whose left half is red, in one of the formats."""
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[:, :16] = (220, 20, 20)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_and_named(form, tmp_path):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    file = tmp_path / f"a{FORMATS[form][0]}"
    file.write_bytes(everywhere(form))
    assert header_from(file, "a") == (form, (32, 32))
    out = square(file, 32)
    assert abs(out[16, 4].astype(int) - (220, 20, 20)).max() < 30 and out[16, 28].min() > 230


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        stream = io.BytesIO()
        frames[0].save(stream, form, save_all=True, append_images=frames[1:], lossless=True)
        assert square(stream, 8)[0, 0].tolist() == [255, 0, 0]


def test_no_decoder_runs_another_program():
    assert not {"EPS", "WMF", "PDF", "MPEG", "FITS"} & set(DECODERS)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.full((4, 4), 0.5, np.float32), "floating-point pixels"),
        (np.full((4, 4), 2**20, np.int32), "grey values from 1048576"),
    ],
)
def test_pixels_that_no_screen_shows_are_refused(pixels, words):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "TIFF")
    with pytest.raises(BadSample, match=words):
        square(stream, 4)


def test_what_is_no_file_is_a_bad_sample(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path, "/dev/zero"):
        with pytest.raises(BadSample, match="unreadable picture"):
            square(path, 4)
