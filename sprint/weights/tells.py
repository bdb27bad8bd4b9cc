"""What does a file that is no teacher look like? A table of names that tell, for messages."""

import re
from collections.abc import Iterable

# pattern of a tensor's name, what a file with such names looks like, what to do; the first that is found counts
ADAPTERS = (
    (
        r"\.base_layer\.|^base_model\.model\.",
        "a model that PEFT wraps: call merge_and_unload() on it and save what that gives",
    ),
    (r"lora_magnitude_vector|dora_scale", "a DoRA: merge it into its base first, and give the merged model"),
    (r"lokr_w[12]|hada_w[12]", "a LoKr or LoHa: merge it into its base first, and give the merged model"),
    (
        r"lora_[AB]\b|lora_(up|down)\b|\.lora\.(up|down)\.|lora_embedding|lora_linear_layer|_lora\.(up|down)",
        "a LoRA: merge it into its base first (fuse_lora in diffusers), and give the merged model",
    ),
    (r"\bia3_l|\boft_(r|blocks|diag)", "an adapter: merge it into its base first, and give the merged model"),
)
LOOKS = (
    (r"_flat_param\b", "a part of an FSDP checkpoint: save the full state_dict (FULL_STATE_DICT)"),
    (
        r"\.(qweight|qzeros|absmax|quant_map|scale_weight|weight_scale|weight_packed)\b|quant_state|wscales",
        "a quantised model: give the one that it was made from, in float32, float16 or bfloat16",
    ),
    (
        r"(^|\.)(exp_avg|exp_avg_sq|momentum_buffer)\b",
        "an optimizer's state: the weights are in another file",
    ),
    (
        r"controlnet|control_blocks\.|input_hint_block|zero_convs?\.",
        "a ControlNet, which is no teacher: give its base",
    ),
    (r"ip_adapter|^image_proj\.", "an IP-Adapter, which is no teacher: give its base"),
    (
        r"^(conditioner\.embedders|cond_stage_model)\.",
        "a whole Stable Diffusion or SDXL checkpoint, whose network is of another family",
    ),
    (
        r"double_blocks\.|single_transformer_blocks\.|single_blocks\.",
        "FLUX or a relative, which is of another family",
    ),
    (
        r"joint_blocks\.|\.attn\.add_[qkv]_proj",
        "Stable Diffusion 3 or a relative, of another family",
    ),
    (
        r"(encoder|decoder)\.(mid_block|up_blocks|down_blocks|stages|mid|up|down)\b|quant_conv\.",
        "an autoencoder (VAE): give the transformer beside it",
    ),
    (
        r"(input|output)_blocks\.\d|(down|up)_blocks\.\d+\.(attentions|resnets)|mid_block\.attentions\.\d+\.proj_in",
        "a UNet of Stable Diffusion, of another family",
    ),
    (
        r"(^|\.)layers\.\d+\.(self_attn|mlp)\.|text_model\.encoder\.|encoder\.block\.\d+\.layer|embed_tokens|token_embd",
        "a text encoder or a language model: give the transformer beside it",
    ),
    (r"adaln_single\.|cross_attn_blocks|caption_projection\.", "a PixArt or a relative, of another family"),
    (
        r"(^|\.)visual\.|vision_model\.|(^|\.)blocks\.\d+\.norm1\.",
        "a vision transformer, of another family",
    ),
)


def adapter(names: Iterable[str]) -> str:
    """What kind of addition to a network these tensors are, and what to do with it; "" for none."""
    return _first_told(ADAPTERS, names)


def looks_like(names: Iterable[str]) -> str:
    """The best guess at what tensors of these names belong to; "" for none."""
    return _first_told((*ADAPTERS, *LOOKS), names)


def _first_told(table: Iterable[tuple[str, str]], names: Iterable[str]) -> str:
    names = [name[:300] for name in names]
    for pattern, what in table:
        if any(map(re.compile(pattern).search, names)):
            return what
    return ""
