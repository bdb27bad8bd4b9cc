"""CLIP score: how well pictures match their prompts, as SANA-Sprint's tables give it (arXiv 2503.09641, Table 2).

The figures near 28 there come from the metric toolkit of Sana's public repository: OpenAI's ViT-L/14, pictures
prepared by CLIP's own preprocessing, MJHQ-30K's prompts cut at 77 tokens, and the cosine times CLIP's logit scale,
which is 100 in OpenAI's weights. Nothing is clamped at 0; torchmetrics' CLIPScore clamps the mean of all, which tells
only where that is negative. Two differences stay: Sana embeds in float16 on a GPU, we in float32; and OpenAI's
tokenizer first mends broken Unicode and HTML escapes in a prompt, transformers' does not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.metrics.metric import Choices, Drawn
from sprint.evaluate.metrics.registry import CLIP
from sprint.evaluate.prompts import Prompts, needed
from sprint.evaluate.result import Measured, Verdicts

try:  # PIL's resampling, as OpenAI's code has it, whether or not torchvision is installed
    from transformers import CLIPImageProcessorPil as PilProcessor
except ImportError:  # transformers 4, where the plain class is PIL's
    from transformers import CLIPImageProcessor as PilProcessor

VIT_L_14 = "openai/clip-vit-large-patch14"
IN_ONE_FORWARD = 64  # pictures or texts in one forward


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP in float32 with what prepares its inputs."""

    name: str
    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    processor: BaseImageProcessor

    @property
    def context(self) -> int:
        """Most tokens of a text, those that mark its beginning and end included: 77 in OpenAI's."""
        return self.model.config.text_config.max_position_embeddings


def load_clip(name: str = VIT_L_14, device: torch.device | str = "cpu") -> Clip:
    """A CLIP in transformers' layout, from a local folder or the hub; its weights are safetensors.

    Raises NotHereError for a hub id that is neither in the cache nor to be fetched now, and SprintError for a
    folder or a model that is no CLIP.
    """
    try:
        config = CLIPConfig.get_config_dict(name)[0]
        if not config:
            raise OSError("config.json is not there")
        if config.get("model_type") != "clip":
            raise SprintError(
                f"{name}: a {config.get('model_type')} model, no CLIP; name one, such as {VIT_L_14}"
            )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        processor = PilProcessor.from_pretrained(name, trust_remote_code=False)
        model, loading = CLIPModel.from_pretrained(
            name,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(name, error) from error
    if missing := sorted(loading["missing_keys"]):
        raise SprintError(f"{name}: {len(missing)} of CLIP's weights are not there, such as {missing[0]}")
    return Clip(name, model.eval().requires_grad_(False).to(device), tokenizer, processor)


def _not_loaded(name: str, error: Exception) -> SprintError:
    reason = str(error).strip().split("\n")[0]
    if Path(name).exists():
        wanted = "config.json, model.safetensors, the tokenizer's files and preprocessor_config.json"
        return SprintError(f"{name}: no CLIP to load there; expected {wanted} ({reason})")
    return NotHereError(
        f"CLIP {name} is not here; fetch it with `hf download {name}`, or name a folder that has it ({reason})"
    )


@torch.no_grad()
def embed_pictures(clip: Clip, pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures uint8 [H, W, 3], which may differ in size  -> unit vectors [B, D], float32, on the CPU

    Shorter side to CLIP's size (224) by PIL's bicubic resampling, centre cut out, CLIP's mean and deviation.
    """
    for picture in pictures:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise SprintError(
                f"CLIP reads pictures of uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}"
            )

    def embedded(some: Sequence[np.ndarray]) -> Tensor:
        pixels = clip.processor(
            list(some), input_data_format="channels_last", return_tensors="pt"
        ).pixel_values
        pooled = clip.model.vision_model(pixels.to(clip.model.device, torch.float32)).pooler_output
        return normalize(clip.model.visual_projection(pooled), dim=-1).cpu()

    return _in_parts(clip, embedded, pictures)


@torch.no_grad()
def embed_texts(clip: Clip, texts: Sequence[str]) -> Tensor:
    """Texts, cut after `clip.context` tokens  -> unit vectors [B, D], float32, on the CPU"""

    def embedded(some: Sequence[str]) -> Tensor:
        tokens = clip.tokenizer(
            list(some), padding=True, truncation=True, max_length=clip.context, return_tensors="pt"
        ).to(clip.model.device)
        pooled = clip.model.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
        return normalize(clip.model.text_projection(pooled), dim=-1).cpu()

    return _in_parts(clip, embedded, texts)


def _in_parts(clip: Clip, embedded: Callable[[Sequence], Tensor], items: Sequence) -> Tensor:
    parts = [
        embedded(items[start : start + IN_ONE_FORWARD]) for start in range(0, len(items), IN_ONE_FORWARD)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, clip.model.config.projection_dim)


class ClipScorer:
    """100 · cos(picture, prompt), from −100 to 100."""

    def __init__(self, name: str = VIT_L_14, device: torch.device | str = "cpu"):
        """name   local folder or hub id of a CLIP; raises as `load_clip` does"""
        self.clip = load_clip(name, device)

    @property
    def protocol(self) -> str:
        """What stands beside the figure."""
        return (
            f"{self.clip.name}, 100 · cosine, not clamped, prompts cut at {self.clip.context} tokens, "
            "pictures by PIL's bicubic resampling, float32"
        )

    def __call__(self, pictures: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """Pictures uint8 [B, H, W, 3] and a prompt for each  -> scores [B], float32, on the CPU"""
        if len(pictures) != len(prompts):
            raise SprintError(
                f"CLIP score: {len(pictures)} pictures but {len(prompts)} prompts; give one for each"
            )
        return 100 * (embed_pictures(self.clip, pictures) * embed_texts(self.clip, prompts)).sum(-1)


def wanted_clip(choices: Choices) -> str:
    """Which CLIP. Raises NotHereError where it is not on this machine and the hub is not to be asked."""
    name = choices.clip_model or VIT_L_14
    here = Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str)
    if not here and not choices.fetch:
        raise NotHereError(
            f"no CLIP here; fetch it with `hf download {name}`, or name this metric after --metrics"
        )
    return name


class ClipScore:
    """100 · cosine between CLIP's embeddings of picture and prompt."""

    metric, size = CLIP, None

    def __init__(self, choices: Choices, prompts: Prompts | NotHereError):
        self.choices, self.prompts = choices, prompts

    def find(self) -> Prompts:
        return needed(self.prompts)

    def open(self) -> None:
        self.scorer = ClipScorer(wanted_clip(self.choices), self.choices.device)

    def protocol(self) -> dict[str, str]:
        return {
            "pictures": self.prompts.words,
            "network": self.scorer.protocol,
            "error": "± is the standard error of the mean",
        }

    def measure(self, drawn: Drawn) -> Measured:
        texts = [shot.prompt for shot in drawn.prompts.shots]
        scores: list[float] = []
        for batch in drawn.batches("CLIP score"):
            scores += self.scorer(batch, texts[len(scores) : len(scores) + len(batch)]).tolist()
        error = stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
        return Measured(
            {"CLIP score": self.metric.figure(fmean(scores), error)},
            Verdicts(drawn.prompts.name, scores=[round(score, 3) for score in scores]),
        )
