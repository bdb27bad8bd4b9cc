"""The two networks behind GenEval, through transformers: Mask2Former finds objects, CLIP names their colour.

The detector's pictures are prepared here, with torch alone, as the official program's library (mmdet 2) prepares
them: transformers' own processor takes its settings from the checkpoint, and those squash every picture to 384×384,
where the official program gives the network 800 pixels on the short side.

What is the same as in the official program and what is not is said at each class. The rules are checked on
hand-made objects and the arithmetic on random networks; no figure has been compared with the official program's
on pictures, since neither its weights nor these were at hand.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad
from transformers import Mask2FormerForUniversalSegmentation as Mask2Former

from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.metrics.clip import VIT_L_14, embed_pictures, embed_texts, load_clip
from sprint.evaluate.metrics.geneval_rules import CLASSES, COLORS, MIN_SCORE, Detection

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels the detector sees, at most
STRIDE = 32  # of the detector's backbone: sides are padded to a multiple
MAX_CANDIDATES = 100  # pairs of a mask and a class that are looked at
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, of 255
GREY = 0x99  # what surrounds an object when its colour is asked for
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)

# Other spellings of COCO's classes in published checkpoints  -> GenEval's.
SPELLINGS = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
}


# ---- objects ----------------------------------------------------------------------------------------


class Detector:
    """Mask2Former for COCO instances, in GenEval `facebook/mask2former-swin-small-coco-instance`.

    The official program runs mmdet's Mask2Former Swin-S. Architecture, input, scores, masks and boxes are the same;
    the weights are not: mmdet trained its own (mask AP 46.1 by its model zoo), these are from the network's authors
    (46.3 by theirs). By how much GenEval differs has not been measured.
    """

    def __init__(self, name: str = MASK2FORMER, device: torch.device | str = "cpu"):
        """name   local folder or hub id; raises as `load_detector` does"""
        self.network = load_detector(name).to(device)
        self.names = class_names(self.network.config.id2label, name)

    @torch.no_grad()
    def __call__(self, picture: np.ndarray) -> dict[str, list[Detection]]:
        """uint8 [H, W, 3] -> objects that score more than 0.3, by GenEval's class names."""
        pixels, seen = detector_pixels(picture)
        found = self.network(pixel_values=pixels.to(self.network.device))
        detections: dict[str, list[Detection]] = {}
        for label, detection in instances(
            found.class_queries_logits[0],
            found.masks_queries_logits[0],
            pixels.shape[2:],
            seen,
            picture.shape[:2],
        ):
            detections.setdefault(self.names[label], []).append(detection)
        return detections


def load_detector(name: str) -> Mask2Former:
    """A Mask2Former in transformers' layout, float32, from a local folder or the hub; its weights are safetensors.

    Raises NotHereError for a hub id that is neither in the cache nor to be fetched now, or where scipy is missing
    (transformers wants it for this network), and SprintError for a folder or a model that is no Mask2Former.
    """
    try:
        kind = Mask2Former.config_class.get_config_dict(name)[0].get("model_type")
        if kind != "mask2former":
            raise SprintError(f"{name}: a {kind} model, no Mask2Former; name one, such as {MASK2FORMER}")
        network, loading = Mask2Former.from_pretrained(
            name,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except ImportError as error:
        reason = str(error).strip().split("\n")[0]
        raise NotHereError(
            f"GenEval's detector needs scipy: pip install 'sprint-distill[eval]' ({reason})"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        if Path(name).exists():
            raise SprintError(f"{name}: no Mask2Former to load there ({reason})") from error
        raise NotHereError(
            f"GenEval's detector {name} is not here; fetch it with `hf download {name}`, "
            f"or name a folder that has it ({reason})"
        ) from error
    learned = dict(network.named_parameters())  # buffers follow from the configuration
    if missing := sorted(key for key in loading["missing_keys"] if key in learned):
        raise SprintError(
            f"{name}: {len(missing)} of the detector's weights are not there, such as {missing[0]}"
        )
    return network.eval().requires_grad_(False)


def class_names(id2label: Mapping[int, str], source: str) -> list[str]:
    """GenEval's name for each of a detector's classes. Raises SprintError unless they are COCO's 80, once each."""
    names = [SPELLINGS.get(id2label[i], id2label[i]) for i in range(len(id2label))]
    missing = [name for name in CLASSES if name not in names]
    if missing or len(names) != len(CLASSES):
        lacking = f", without {missing[0]!r}" if missing else ""
        raise SprintError(
            f"{source}: {len(names)} classes{lacking}, not COCO's 80; name a Mask2Former for COCO instances, such "
            f"as {MASK2FORMER}"
        )
    return names


def detector_pixels(picture: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
    """uint8 [H, W, 3] -> what the detector sees, float32 [1, 3, h, w], and (height, width) of it that is picture.

    As mmdet: as large as fits 800 × 1333 with the aspect kept, bilinear without antialiasing, rounded to whole
    levels (OpenCV's integer arithmetic may differ by one of 255), normalised, zeros to a multiple of 32 below
    and to the right.
    """
    height, width = picture.shape[:2]
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    seen = int(height * scale + 0.5), int(width * scale + 0.5)
    x = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    x = interpolate(x, seen, mode="bilinear", align_corners=False).round()
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
    return pad(x, (0, -seen[1] % STRIDE, 0, -seen[0] % STRIDE)), seen


def instances(
    class_logits_QK: Tensor,
    mask_logits_Qhw: Tensor,
    padded: Sequence[int],
    seen: Sequence[int],
    size: Sequence[int],
    min_score: float = MIN_SCORE,
) -> list[tuple[int, Detection]]:
    """One picture's objects from the network's outputs, with the index of their class, best first.

    class_logits_QK  for each query the classes and, last, "nothing"
    mask_logits_Qhw  a quarter of the size the network saw
    padded, seen, size  (height, width) of what it saw, of the part that is picture, and of the picture

    A score is the class's probability times the mean probability of the mask's pixels; a query may stand for
    several classes; a box is the tightest around its mask. As in mmdet and the authors' code. transformers'
    `post_process_instance_segmentation` has the same arithmetic on masks of 384×384, whatever the picture's
    size, and enlarges the finished mask by nearest neighbours; at 384×384 both agree.
    """
    probabilities = class_logits_QK.softmax(-1)[:, :-1]
    top, flat = probabilities.flatten().topk(min(MAX_CANDIDATES, probabilities.numel()))
    flat, top = flat[top > min_score], top[top > min_score]  # a mask's mean probability is at most 1
    query, label = flat // probabilities.shape[1], flat % probabilities.shape[1]

    found = []
    # One after another: a hundred masks of a large picture would not fit into every memory.
    for q, k, probability in zip(query.tolist(), label.tolist(), top, strict=True):
        mask_logits = interpolate(mask_logits_Qhw[None, q : q + 1], tuple(padded), mode="bilinear")
        mask_logits = mask_logits[..., : seen[0], : seen[1]]
        mask_logits = interpolate(mask_logits, tuple(size), mode="bilinear")[0, 0]
        mask = mask_logits > 0
        confidence = (mask_logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        score = (probability * confidence).item()
        if score > min_score:
            found.append((k, Detection(mask_box(mask), score, mask.cpu().numpy())))
    return sorted(found, key=lambda pair: pair[1].score, reverse=True)


def mask_box(mask: Tensor) -> tuple[float, float, float, float]:
    """bool [H, W], not empty -> the tightest (x1, y1, x2, y2) in pixels, the far edges exclusive."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


# ---- colours ----------------------------------------------------------------------------------------


class ColorNamer:
    """CLIP as a zero-shot classifier of GenEval's ten colours, in GenEval `openai/clip-vit-large-patch14`.

    The official program runs the same weights through open_clip, in half precision on a GPU; here they are float32.
    Where a resized crop is an odd number of pixels too long, its centre is one pixel further left or up here.
    """

    def __init__(self, name: str = VIT_L_14, device: torch.device | str = "cpu"):
        """name   local folder or hub id; raises as `load_clip` does"""
        self.clip = load_clip(name, device)
        self._directions: dict[str, Tensor] = {}

    def __call__(self, picture: np.ndarray, name: str, objects: Sequence[Detection]) -> list[str]:
        """A picture, uint8 [H, W, 3], and objects of one class in it  -> the colour of each."""
        seen = embed_pictures(self.clip, [cut_out(picture, found) for found in objects])
        return [COLORS[i] for i in (seen @ self.directions(name).T).argmax(1).tolist()]

    def directions(self, name: str) -> Tensor:
        """Of a class in each colour, unit vectors [10, D]: the mean of the unit vectors of its three prompts."""
        if name not in self._directions:
            prompts = [t.format(color=color, name=name) for color in COLORS for t in TEMPLATES]
            said = embed_texts(self.clip, prompts).view(len(COLORS), len(TEMPLATES), -1)
            self._directions[name] = normalize(said.mean(1), dim=-1)
        return self._directions[name]


def cut_out(picture: np.ndarray, found: Detection) -> np.ndarray:
    """uint8 [H, W, 3] -> the object's box, [h, w, 3], grey outside its mask if it has one."""
    if found.mask is not None:
        picture = np.where(found.mask[..., None], picture, np.uint8(GREY))
    x1, y1, x2, y2 = (round(edge) for edge in found.box)
    return picture[y1:y2, x1:x2]
