"""What a teacher in training draws of held-out prompts, and how good it is: score and FID over guidance."""

from functools import partial

import numpy as np
import torch

from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid
from sprint.evaluate.metrics.real_scenes import real_statistics
from sprint.lab.features import scene_features
from sprint.lab.reader import score
from sprint.lab.series import held_out_scenes
from sprint.maths.samplers import Noise, sample_ode
from sprint.maths.schedule import teacher_times
from sprint.models.encoders import Family, encode_null
from sprint.models.guidance import guided_velocity, with_null
from sprint.models.view import TrigFlowView

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.5)
STEPS, AT_ONCE = 20, 32  # prompts; with guidance that is a training batch


@torch.no_grad()
def drawn(
    view: TrigFlowView, family: Family, prompts: int, guidance: float, steps: int = STEPS
) -> np.ndarray:
    """Pictures of the first held-out prompts, each from the seed of its number.  -> uint8 [prompts, H, W, 3]"""
    null = encode_null(family)
    captions = [s.caption for s in held_out_scenes(prompts)]
    pictures = []
    for start in range(0, prompts, AT_ONCE):
        text, mask = family.encode_trimmed(captions[start : start + AT_ONCE])
        scale = torch.full((len(text),), guidance, device=text.device)
        F = partial(guided_velocity, view, guided=with_null(text, mask, *null), guidance_scale=scale)
        seeds = list(range(start, start + len(text)))
        shape = view.sizes.channels, view.sizes.side, view.sizes.side
        latent = sample_ode(F, Noise(seeds, shape, text.device), teacher_times(steps))
        pictures.append(family.decode_latents(latent))
    return np.concatenate(pictures)


def scored(pictures: np.ndarray) -> dict:
    """The reader's verdict on pictures of the first held-out prompts."""
    return score(pictures, [s.claim for s in held_out_scenes(len(pictures))])


def guidance_curve(view: TrigFlowView, family: Family, prompts: int) -> dict:
    """Score and FID at each of GUIDANCES, and the one with the best score.

    -> {"steps", "best_guidance", "curve": {guidance: {"fid", …of `scored`}}}
    """
    network = scene_features(family.device)
    real = real_statistics(network)
    curve = {}
    for guidance in GUIDANCES:
        pictures = drawn(view, family, prompts, guidance)
        distance = fid(GaussianStatistics.of(network(pictures)), real)
        curve[f"{guidance:g}"] = {"fid": round(distance, 2)} | scored(pictures)
    best = max(curve, key=lambda guidance: curve[guidance]["mean_over_samples"])
    return {"steps": STEPS, "best_guidance": float(best), "curve": curve}
