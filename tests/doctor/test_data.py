"""What is wrong with a data set: pictures, captions, latents, each made wrong on purpose."""

import numpy as np
import pytest
import torch
from PIL import Image

from sprint.base.errors import SprintError
from sprint.data.look import look
from sprint.doctor.data import data_of, examine_data, examine_recipe_data, latents, texts
from sprint.doctor.findings import Level
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Data, DataKind
from tests.doctor.test_model import found, troubles

SIZE = ["data.size=64"]


def write(folder, count: int, size: int = 64, same: bool = False, caption="a picture, number {}"):
    """Pictures of noise with their captions; all of one content where they are the same."""
    folder.mkdir(exist_ok=True)
    for k in range(count):
        draw = np.random.default_rng(0 if same else k)
        Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{k:02}.png")
        (folder / f"{k:02}.txt").write_text(caption.format(k))
    return folder


def test_good_pictures_are_well_and_shown(tmp_path):
    findings = examine_data(str(write(tmp_path / "good", 6)), SIZE, tmp_path / "out")
    assert troubles(findings) == []
    assert "6 samples" in found(findings, Level.ok, "data")
    page = (tmp_path / "out" / "good.html").read_text()
    assert page.count("<img") == 6 and "a picture, number 3" in page


def test_small_pictures(tmp_path):
    folder = str(write(tmp_path / "small", 4, size=40))
    text = found(examine_data(folder, SIZE, tmp_path), Level.wrong, "small")
    assert "4 of 4 pictures are smaller than 64 pixels" in text and "data.size=32" in text
    write(tmp_path / "mixed", 6)
    Image.new("RGB", (8, 8)).save(tmp_path / "mixed" / "00.png")
    assert "1 of 6" in found(examine_data(str(tmp_path / "mixed"), SIZE, tmp_path), Level.note, "small")


def test_repeated_pictures_and_captions(tmp_path):
    folder = write(tmp_path / "same", 5, same=True, caption="a picture")
    findings = examine_data(str(folder), SIZE, tmp_path)
    assert "4 of 5 pictures are byte for byte" in found(findings, Level.wrong, "repeated")
    assert "5 of 5 captions are the same" in found(findings, Level.wrong, "captions")


def test_bad_samples_by_reason(tmp_path):
    folder = write(tmp_path / "bad", 5)
    (folder / "01.png").write_bytes(b"no picture")
    (folder / "02.txt").write_text("  ")
    text = found(examine_data(str(folder), SIZE, tmp_path), Level.wrong, "bad samples")
    assert "2 of 5" in text and "1 unreadable picture" in text and "1 empty caption" in text
    allowed = examine_data(str(folder), [*SIZE, "data.bad_share=0.5"], tmp_path)
    assert "2 of 5" in found(allowed, Level.note, "bad samples")
    assert found(allowed, Level.wrong, "bad samples") == ""


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / "notes.txt").write_text("no caption of anything")
    findings = examine_data(str(tmp_path), ["data.kind=folder"], tmp_path / "out")
    assert "no pictures" in found(findings, Level.wrong, "data")


def test_prompts_have_no_pictures(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a dot\na square\n")
    findings = examine_data(str(file), [], tmp_path / "out")
    assert troubles(findings) == [] and not (tmp_path / "out").exists()


def test_latents_of_the_wrong_scale():
    generator = torch.Generator().manual_seed(0)
    good = [torch.randn(4, 8, 8, generator=generator) for _ in range(8)]
    assert troubles(latents(good)) == []
    for scale in (0.41, 2.4):  # without the factor of the public autoencoder, or with it twice
        assert "scaling_factor" in found(latents([scale * one for one in good]), Level.wrong, "latents")
    assert "scaling_factor" in found(latents([one + 1 for one in good]), Level.wrong, "latents")
    assert "all 3 are the same" in found(latents(good[:1] * 3), Level.wrong, "latents")
    assert latents([]) == texts([]) == []


def test_texts_that_are_all_the_same():
    generator = torch.Generator().manual_seed(0)
    several = [torch.randn(length, 8, generator=generator) for length in (3, 5)]
    assert found(texts(several), Level.ok, "texts").startswith("3 to 5 tokens")
    assert "all 2 are the same" in found(texts(several[:1] * 2), Level.wrong, "texts")


def test_what_a_recipe_reads(tmp_path):
    assert troubles(examine_recipe_data(load_recipe("tiny"))) == []
    recipe = load_recipe("0.6b", [f"data.path={tmp_path / 'absent'}"])
    assert "no such folder" in found(examine_recipe_data(recipe), Level.wrong, "data")
    hub = load_recipe("0.6b", ["data.kind=huggingface", "data.path=owner/name"])
    assert "may download" in found(examine_recipe_data(hub), Level.note, "data")


def test_the_kind_is_told_or_asked_for(tmp_path):
    assert data_of(str(write(tmp_path / "pictures", 1))).kind is DataKind.folder
    assert data_of(str(tmp_path / "x.txt"), ["data.kind=prompts"]).kind is DataKind.prompts
    with pytest.raises(SprintError, match="which kind of data"):
        data_of(str(tmp_path / "absent"))


def test_look_is_what_the_doctor_reads(tmp_path):
    data = Data(kind=DataKind.folder, path=str(write(tmp_path / "some", 3)), size=64)
    assert look(data).problems() == []
