"""CLIP score on a random CLIP of a few thousand weights, against transformers' and PIL's own arithmetic."""

import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.metrics import clip as clip_score
from sprint.evaluate.metrics.clip import (
    ClipScorer,
    PilProcessor,
    embed_pictures,
    embed_texts,
    load_clip,
)
from tests.tolerance import assert_close, of_network, rounding

SIDE, WIDTH = 32, 16
PROMPTS = ["a red circle", "dot", "two blue squares and one green triangle", ""]


SCALE = 100.0  # of the score: that of a cosine of one


def save_mini_clip(folder: Path) -> Path:
    """One token a letter, two layers on each side, pictures of 32 pixels."""
    torch.manual_seed(0)
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    special = {
        "bos_token_id": vocab["<|startoftext|>"],
        "eos_token_id": vocab["<|endoftext|>"],
        "pad_token_id": vocab["<|endoftext|>"],
    }
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config=tower | special | {"vocab_size": len(vocab)},
        vision_config=tower | {"image_size": SIDE, "patch_size": 8},
        projection_dim=8,
    )
    model = CLIPModel(config)
    for weight in model.parameters():  # as initialised, every picture looks alike
        weight.data += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    PilProcessor(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_mini_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scorer(folder):
    return ClipScorer(str(folder))


@pytest.fixture
def copy(tmp_path, folder):
    """The folder again, for a test to spoil."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def some_pictures(count: int = 4, height: int = 40, width: int = 60) -> np.ndarray:
    """Smooth, all different."""
    small = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((width, height))) for x in small])


def pixels_by_hand(picture: np.ndarray) -> torch.Tensor:
    """CLIP's preprocessing in Pillow and numpy: shorter side to 32, bicubic; the centre; mean and deviation."""
    height, width = picture.shape[:2]
    short = min(height, width)
    size = (int(SIDE * width / short), int(SIDE * height / short))
    resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - SIDE) // 2, (resized.shape[1] - SIDE) // 2
    x = resized[top : top + SIDE, left : left + SIDE] / 255
    x = (x - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return torch.tensor(x.transpose(2, 0, 1), dtype=torch.float32)


# ---- the score ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(40, 60), (60, 40), (32, 32), (20, 20)])
def test_the_score_is_that_of_transformers_own_logits(scorer, height, width):
    pictures, clip = some_pictures(4, height, width), scorer.clip
    with torch.no_grad():
        logits = clip.model(
            pixel_values=torch.stack([pixels_by_hand(picture) for picture in pictures]),
            **clip.tokenizer(PROMPTS, padding=True, return_tensors="pt"),
        ).logits_per_image
    expected = logits.diag() / clip.model.logit_scale.exp() * 100
    assert expected.std() > 1
    assert_close(scorer(pictures, PROMPTS), expected, of_network(clip.model), SCALE)


def test_scores_below_zero_stay(folder):
    scorer = ClipScorer(str(folder))
    before = scorer(some_pictures(), PROMPTS)
    scorer.clip.model.text_projection.weight.neg_()
    assert_close(scorer(some_pictures(), PROMPTS), -before, of_network(scorer.clip.model), SCALE)
    assert min(before.min(), -before.max()) < 0


def test_a_picture_depends_on_no_other_in_its_batch(scorer, monkeypatch):
    together = scorer(some_pictures(), PROMPTS)
    alone = [
        scorer(picture[None], [prompt]) for picture, prompt in zip(some_pictures(), PROMPTS, strict=True)
    ]
    tolerance = of_network(scorer.clip.model)
    assert_close(torch.cat(alone), together, tolerance, SCALE)
    monkeypatch.setattr(clip_score, "IN_ONE_FORWARD", 3)
    assert_close(scorer(some_pictures(), PROMPTS), together, tolerance, SCALE)


def test_nothing_to_score(scorer):
    assert scorer(some_pictures()[:0], []).shape == (0,)


def test_the_protocol_names_the_model_and_the_cut(scorer, folder):
    assert str(folder) in scorer.protocol
    assert "77 tokens" in scorer.protocol


# ---- embeddings ---------------------------------------------------------------------------------------


def test_prompts_are_cut_at_77_tokens(scorer):
    read = "x " * 75  # a token a word, between those of beginning and end
    kept, cut, shorter = embed_texts(scorer.clip, [read, read + "y " * 40, read[:-2]])
    assert_close(cut, kept, of_network(scorer.clip.model))
    assert (shorter - kept).norm() > 1e-3


def test_embeddings_are_unit_vectors_of_pictures_of_any_size(scorer):
    crops = [some_pictures(1, 40, 60)[0], some_pictures(1, 33, 90)[0]]
    vectors = embed_pictures(scorer.clip, crops)
    assert vectors.shape == (2, 8) and vectors.dtype == torch.float32
    assert_close(vectors.norm(dim=1), torch.ones(2), rounding(torch.float32, terms=8, steps=2))
    assert_close(vectors[1:], embed_pictures(scorer.clip, crops[1:]), of_network(scorer.clip.model))


def test_three_rows_of_pixels_are_not_taken_for_channels(scorer):
    picture = some_pictures(1, 3, 40)[0]
    with torch.no_grad():
        expected = scorer.clip.model(
            pixel_values=pixels_by_hand(picture)[None], **scorer.clip.tokenizer(["a"], return_tensors="pt")
        ).image_embeds
    assert_close(embed_pictures(scorer.clip, [picture]), expected, of_network(scorer.clip.model))


# ---- wrong input --------------------------------------------------------------------------------------


def test_a_prompt_for_each_picture(scorer):
    with pytest.raises(SprintError, match="4 pictures but 3 prompts"):
        scorer(some_pictures(), PROMPTS[:3])


@pytest.mark.parametrize(
    "pictures",
    [some_pictures() / 255, some_pictures()[..., :1], some_pictures()[..., 0], some_pictures()[:, :0]],
    ids=["float", "grey", "no channels", "no rows"],
)
def test_pictures_are_uint8_rgb(scorer, pictures):
    with pytest.raises(SprintError, match=r"uint8 \[H, W, 3\]"):
        scorer(pictures, PROMPTS)


def test_offline_without_weights_the_error_names_what_to_fetch(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotHereError, match="hf download nobody/no-clip") as caught:
        load_clip("nobody/no-clip")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_folder_that_lacks_a_file_is_no_matter_of_fetching(copy, missing):
    (copy / missing).unlink()
    with pytest.raises(SprintError, match=r"no CLIP to load there; expected config\.json") as caught:
        load_clip(str(copy))
    assert not isinstance(caught.value, NotHereError)


def test_a_damaged_file_of_weights(copy):
    (copy / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(SprintError, match="no CLIP to load there"):
        load_clip(str(copy))


def test_pickled_weights_are_not_read(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(SprintError, match="no CLIP to load there"):
        load_clip(str(copy))


def test_weights_that_are_not_there_are_not_made_up(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SprintError, match=r"1 of CLIP's weights are not there, such as visual_projection"):
        load_clip(str(copy))


def test_another_kind_of_model(copy):
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "siglip"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(SprintError, match="a siglip model, no CLIP"):
        load_clip(str(copy))
