"""GenEval's two networks on random weights: what they see, and their arithmetic against transformers' own."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate
from transformers import Mask2FormerConfig, SwinConfig
from transformers import Mask2FormerForUniversalSegmentation as Mask2Former
from transformers.models.mask2former import modeling_mask2former
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerForUniversalSegmentationOutput as Output,
)

from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.metrics.geneval_models import (
    DEVIATION,
    GREY,
    MEAN,
    SPELLINGS,
    TEMPLATES,
    ColorNamer,
    Detector,
    class_names,
    cut_out,
    detector_pixels,
    instances,
    load_detector,
    mask_box,
)
from sprint.evaluate.metrics.geneval_rules import CLASSES, COLORS, Detection
from tests.evaluate.metrics.test_clip import save_mini_clip
from tests.tolerance import assert_close, near, of_network, rounding

try:
    from transformers import Mask2FormerImageProcessorPil as Mask2FormerProcessor
except ImportError:  # transformers 4
    from transformers import Mask2FormerImageProcessor as Mask2FormerProcessor

QUERIES = 6

# ---- class names --------------------------------------------------------------------------------------

PLAIN_COCO = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
VOC_COCO = PLAIN_COCO | {
    "motorcycle": "motorbike",
    "airplane": "aeroplane",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
}


@pytest.mark.parametrize("spelling", [{}, PLAIN_COCO, VOC_COCO])
def test_all_80_classes_of_a_checkpoint_are_known_in_order(spelling):
    id2label = {i: spelling.get(name, name) for i, name in enumerate(CLASSES)}
    assert class_names(id2label, "x") == list(CLASSES)
    assert set(SPELLINGS) == set(VOC_COCO.values())


def test_a_detector_of_other_classes_is_refused():
    labels = dict(enumerate(CLASSES))
    with pytest.raises(SprintError, match=r"x: 80 classes, without 'cat'"):
        class_names(labels | {15: "kitten"}, "x")
    with pytest.raises(SprintError, match=r"x: 81 classes, not COCO's 80"):
        class_names(labels | {80: "sky"}, "x")
    with pytest.raises(SprintError, match=r"x: 80 classes, without 'computer mouse'"):
        class_names(labels | {64: "tv"}, "x")


# ---- what the detector sees ---------------------------------------------------------------------------


def levels(pixels):
    """Normalised [1, 3, h, w] -> of 255, [h, w, 3]"""
    return (pixels * torch.tensor(DEVIATION).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))[0].permute(
        1, 2, 0
    )


@pytest.mark.parametrize(
    ("size", "seen", "padded"),
    [
        ((1024, 1024), (800, 800), (800, 800)),
        ((512, 768), (800, 1200), (800, 1216)),
        ((600, 1500), (533, 1333), (544, 1344)),
        ((1500, 600), (1333, 533), (1344, 544)),
        ((337, 521), (800, 1237), (800, 1248)),  # 1236.8
    ],
)
def test_a_picture_is_made_to_fit_800_by_1333(size, seen, padded):
    pixels, part = detector_pixels(np.full((*size, 3), (10, 100, 200), np.uint8))
    assert part == seen and tuple(pixels.shape) == (1, 3, *padded)
    h, w = seen
    expected = torch.tensor([10.0, 100.0, 200.0]).expand(h, w, 3)
    assert_close(levels(pixels)[:h, :w], expected, WEIGHED)
    assert (pixels[:, :, h:] == 0).all() and (pixels[:, :, :, w:] == 0).all()


def test_a_picture_that_fits_keeps_its_pixels_and_one_half_as_large_is_interpolated():
    picture = np.random.default_rng(0).integers(0, 256, (800, 800, 3), np.uint8)
    assert np.array_equal(levels(detector_pixels(picture)[0]).round().numpy(), picture)
    halves = np.zeros((400, 400, 3), np.uint8)
    halves[:, 200:] = 201
    row = levels(detector_pixels(halves)[0])[300, 397:403, 0]
    # 50.25 and 150.75 in whole levels
    assert_close(row, torch.tensor([0.0, 0, 50, 151, 201, 201]), WEIGHED, scale=255)


# ---- objects ------------------------------------------------------------------------------------------


WEIGHED = rounding(torch.float32, terms=4, steps=6)  # four pixels, scaled and scaled back


def outputs(seed=0, size=(96, 96), sharpness=6.0):
    """Class logits [Q, 81] and smooth mask logits [Q, h, w], every mask in part on and off."""
    generator = torch.Generator().manual_seed(seed)
    class_logits = sharpness * torch.randn(QUERIES, 81, generator=generator)
    coarse = 4 * torch.randn(1, QUERIES, 5, 5, generator=generator)
    return class_logits, interpolate(coarse, size, mode="bicubic")[0]


def test_at_384_pixels_objects_are_those_of_transformers():
    class_logits, mask_logits = outputs()
    ours = instances(class_logits, mask_logits, (384, 384), (384, 384), (384, 384))
    theirs = Mask2FormerProcessor().post_process_instance_segmentation(
        Output(class_queries_logits=class_logits[None], masks_queries_logits=mask_logits[None]),
        threshold=0.3,
        return_binary_maps=True,
    )[0]
    masks = theirs["segmentation"].bool().numpy()
    expected = sorted(
        (
            (info["score"], info["label_id"], mask)
            for info, mask in zip(theirs["segments_info"], masks, strict=True)
        ),
        key=lambda found: -found[0],
    )
    assert len(ours) == len(expected) > 3
    for (label, found), (score, their_label, mask) in zip(ours, expected, strict=True):
        assert label == their_label and found.score == near(score, rounding(torch.float32, terms=384 * 384))
        assert np.array_equal(found.mask, mask)


def one_object(probability=0.8, logit=2.0):
    """One query of class 3, its mask constant `logit` in a box of the quarter-size map and −`logit` outside."""
    class_logits = torch.full((1, 81), -30.0)
    class_logits[0, 3], class_logits[0, -1] = np.log(probability), np.log(1 - probability)
    mask_logits = torch.full((1, 40, 60), -logit)
    mask_logits[:, 10:20, 5:25] = logit
    return class_logits, mask_logits


def test_a_box_is_in_the_pictures_own_pixels():
    """A map of 40 × 60 stands for 160 × 240 that the network saw, of a picture of 320 × 480: 8 px a cell."""
    ((label, found),) = instances(*one_object(), (160, 240), (160, 240), (320, 480))
    assert label == 3 and found.mask.shape == (320, 480)
    assert found.box == (40, 80, 200, 160)
    y, x = np.nonzero(found.mask)
    assert (x.min(), y.min(), x.max() + 1, y.max() + 1) == found.box


def test_padding_is_cut_off_before_the_mask_is_resized():
    """Only the left upper 80 × 40 of the 160 × 240 is picture: the box (20, 40, 100, 80) there ends at its edge."""
    ((_, found),) = instances(*one_object(), (160, 240), (80, 40), (160, 80))
    assert found.box == (40, 80, 80, 160)


def test_a_score_is_class_times_mask_probability():
    ((_, found),) = instances(*one_object(0.8, logit=1000.0), (160, 240), (160, 240), (160, 240))
    assert found.score == near(0.8, rounding(torch.float32, terms=160 * 240))
    sure_mask, unsure_mask = (one_object(0.8, logit) for logit in (1000.0, 1e-4))
    # not rounding: sigmoid(1e-4) is not yet a half
    assert instances(*unsure_mask, (160, 240), (160, 240), (160, 240))[0][1].score == pytest.approx(
        0.4, abs=1e-4
    )
    assert instances(*sure_mask, (160, 240), (160, 240), (160, 240), min_score=0.81) == []


@pytest.mark.parametrize(("probability", "logit"), [(0.29, 1000.0), (0.59, 1e-4), (0.9, -1000.0)])
def test_what_scores_too_little_or_has_no_mask_is_no_object(probability, logit):
    class_logits, mask_logits = one_object(probability, logit)
    if logit < 0:
        mask_logits = torch.full_like(mask_logits, logit)
    assert instances(class_logits, mask_logits, (160, 240), (160, 240), (160, 240)) == []


def test_leaving_out_unlikely_classes_first_changes_nothing():
    """Scores are never above the class's probability, so masks are made for few of the pairs."""
    for seed in range(5):
        likely = instances(*outputs(seed, sharpness=2.0), (64, 64), (64, 64), (64, 64), min_score=0.1)
        every = instances(*outputs(seed, sharpness=2.0), (64, 64), (64, 64), (64, 64), min_score=0.0)
        assert len(every) > len(likely) > 0
        assert likely == every[: len(likely)] and every[len(likely)][1].score <= 0.1


def test_one_mask_may_be_of_two_classes():
    class_logits, mask_logits = one_object()
    class_logits[0, 5] = class_logits[0, 3] = np.log(0.5)
    class_logits[0, -1] = -30.0
    found = instances(class_logits, mask_logits, (160, 240), (160, 240), (160, 240))
    assert sorted(label for label, _ in found) == [3, 5]


def test_a_box_ends_after_its_last_pixel():
    mask = torch.zeros(10, 20, dtype=torch.bool)
    mask[4, 7] = True
    assert mask_box(mask) == (7, 4, 8, 5)
    mask[9, 19] = True
    assert mask_box(mask) == (7, 4, 20, 10)


# ---- a detector from a folder -------------------------------------------------------------------------


def save_mini_detector(folder):
    """Random, 32 wide, sure of what it says: its class logits are a hundred times as large as initialised."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1] * 4,
        window_size=4,
        out_features=[f"stage{i}" for i in range(1, 5)],
    )
    network = Mask2Former(
        Mask2FormerConfig(
            backbone_config=backbone,
            hidden_dim=32,
            feature_size=32,
            mask_feature_size=32,
            encoder_layers=1,
            decoder_layers=2,
            num_queries=QUERIES,
            num_attention_heads=2,
            dim_feedforward=32,
            encoder_feedforward_dim=32,
            id2label={i: VOC_COCO.get(name, name) for i, name in enumerate(CLASSES)},
        )
    )
    network.class_predictor.weight.data *= 100
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    return save_mini_detector(tmp_path_factory.mktemp("detector"))


@pytest.fixture
def copy(tmp_path, detector_folder):
    """The detector's folder again, for a test to spoil."""
    for file in detector_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def picture(seed=0, size=(64, 96)):
    coarse = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
    return (255 * interpolate(coarse, size, mode="bilinear"))[0].permute(1, 2, 0).byte().numpy()


def test_objects_of_a_picture_by_class(detector_folder):
    network = Mask2Former.from_pretrained(detector_folder).eval()
    pixels, seen = detector_pixels(picture())
    with torch.no_grad():
        out = network(pixel_values=pixels)
    expected = instances(
        out.class_queries_logits[0], out.masks_queries_logits[0], pixels.shape[2:], seen, (64, 96)
    )
    assert expected
    found = Detector(str(detector_folder))(picture())
    assert {name: len(objects) for name, objects in found.items()} == {
        name: sum(CLASSES[label] == name for label, _ in expected) for name in found
    }
    assert sum(map(len, found.values())) == len(expected)
    assert {d.score for objects in found.values() for d in objects} == {d.score for _, d in expected}


def test_detector_folders_that_do_not_open(copy):
    config = json.loads((copy / "config.json").read_text())
    weights = load_file(copy / "model.safetensors")
    lost = {key: value for key, value in weights.items() if "class_predictor.weight" not in key}
    save_file(lost, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SprintError, match=r"1 of the detector's weights are not there, such as class_predictor.wei"
    ):
        load_detector(str(copy))
    (copy / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(SprintError, match=r"no Mask2Former to load there"):
        load_detector(str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(SprintError, match=r"no Mask2Former to load there") as error:
        load_detector(str(copy))
    assert not isinstance(error.value, NotHereError) and "\n" not in str(error.value)
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    with pytest.raises(SprintError, match="a clip model, no Mask2Former"):
        load_detector(str(copy))


def test_without_scipy_the_error_says_what_to_install(monkeypatch, detector_folder):
    def requires_backends(*arguments):
        raise ImportError("\nneeds the scipy library")

    monkeypatch.setattr(modeling_mask2former, "requires_backends", requires_backends)
    with pytest.raises(NotHereError, match=r"scipy: pip install 'sprint-distill\[eval\]'"):
        load_detector(str(detector_folder))


# ---- colours ------------------------------------------------------------------------------------------


def test_an_object_is_cut_out_of_grey():
    whole = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    mask = np.zeros((6, 8), bool)
    mask[2, 3] = True
    cut = cut_out(whole, Detection((3, 1, 5, 4), 0.5, mask))
    assert cut.shape == (3, 2, 3) and np.array_equal(cut[1, 0], whole[2, 3])
    cut[1, 0] = GREY
    assert (cut == 153).all()
    assert np.array_equal(cut_out(whole, Detection((3, 1, 5, 4), 0.5)), whole[1:4, 3:5])


def crops(count=12):
    """Boxes of many shapes in one picture, some with masks."""
    rng = np.random.default_rng(0)
    objects = []
    for i in range(count):
        (x1, y1), (w, h) = rng.integers(0, 40, 2), rng.integers(3, 24, 2)
        mask = rng.random((64, 96)) < 0.7 if i % 2 else None
        objects.append(Detection((x1, y1, x1 + w, y1 + h), 0.5, mask))
    return objects


def test_colours_are_those_of_clips_own_logits(tmp_path):
    """The three prompts of a colour count alike: the cosine with the mean of their directions."""
    namer = ColorNamer(str(save_mini_clip(tmp_path)))
    clip, objects = namer.clip, crops()
    prompts = [t.format(color=c, name="tv remote") for c in COLORS for t in TEMPLATES]
    assert prompts[3:6] == [
        "a photo of a orange tv remote",
        "a photo of a orange-colored tv remote",
        "a photo of a orange object",
    ]
    tokens = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    cuts = [cut_out(picture(), o) for o in objects]
    pixels = clip.processor(cuts, input_data_format="channels_last", return_tensors="pt").pixel_values
    with torch.no_grad():
        out = clip.model(**tokens, pixel_values=pixels)
    cosines = out.logits_per_image / clip.model.logit_scale.exp()
    lengths = out.text_embeds.view(10, 3, -1).mean(1).norm(dim=-1)
    expected = cosines.view(len(objects), 10, 3).mean(-1) / lengths

    assert_close(
        out.image_embeds @ namer.directions("tv remote").T, expected, of_network(clip.model), scale=1
    )
    lengths = namer.directions("tv remote").norm(dim=-1)
    assert_close(lengths, torch.ones(10), rounding(torch.float32, terms=8, steps=2))
    assert not torch.allclose(namer.directions("cat"), namer.directions("tv remote"), atol=1e-3)
    names = namer(picture(), "tv remote", objects)
    assert names == [COLORS[i] for i in expected.argmax(1)]
    assert len(set(names)) > 1
