"""What the tiny teacher is made of: tokenizer, text encoder and network, as they are before training."""

import copy
import json

import torch
from diffusers import SanaTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from sprint.base.products import fastest_products, use_products
from sprint.engine.compiled import compile_blocks
from sprint.models.families import family_of
from sprint.models.teacher import SPARSE_TIME
from sprint.models.view import TrigFlowView

# One step of a student needs depth: after equal updates 8 blocks scored .40 where 4 scored .29. A training step of 12
# blocks of 96 takes as long as one of 8 of 128, with fewer weights.
WIDTH, DEPTH, HEAD_DIM, TEXT_WIDTH = 128, 8, 32, 128
LATENT_SIDE = 8  # cells
VOCABULARY = 448  # 5 special tokens, 256 bytes, the rest learned
MAX_LENGTH = 32  # tokens; the longest caption has 16


def build_tokenizer(captions: list[str]) -> GemmaTokenizer:
    """Gemma's kind of tokenizer (BPE with byte fallback, ▁ for spaces) with merges learned on scenes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_previous")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special + byte_tokens, show_progress=False
    )
    bpe.train_from_iterator((caption.replace(" ", "▁") for caption in captions), trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = GemmaTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=8192)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


def build_text_encoder(vocabulary: int) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=8192,
    )
    return Gemma2Model(config)


def build_network(channels: int, depth: int = DEPTH, width: int = WIDTH) -> SanaTransformer2DModel:
    """Base style: no QK-norm. With diffusers' sines and cosines of a token's column and row."""
    heads = width // HEAD_DIM
    return SanaTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=heads,
        attention_head_dim=HEAD_DIM,
        num_layers=depth,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=width,
        caption_channels=TEXT_WIDTH,
        sample_size=LATENT_SIDE,
        patch_size=1,
        interpolation_scale=1,
    )


class Teacher(torch.nn.Module):
    """Text encoder and network, trained as one."""

    def __init__(self, text_encoder: Gemma2Model, network: SanaTransformer2DModel):
        super().__init__()
        self.text_encoder, self.network = text_encoder, network

    def forward(self, x_fm, t_fm, ids, mask):
        """The flow velocity: x_fm [B, C, h, w], t_fm [B], ids and mask [B, L]  -> [B, C, h, w]"""
        text = self.text_encoder(ids, attention_mask=mask, use_cache=False)[0]
        return self.view().flow_velocity(x_fm, t_fm, text, mask)

    def view(self) -> TrigFlowView:
        return TrigFlowView(self.network, SPARSE_TIME)

    def hasten(self) -> None:
        """Have the network run as fast as it can here: its own order in memory, bf16 products on a CPU that is faster
        so, blocks compiled. Weights and names stay; it can no longer be copied.
        """
        family = family_of(self.network)
        family.lay_out(self.network)
        use_products(family.blocks(self.network), fastest_products())
        compile_blocks(self.network)

    def unhastened(self) -> "Teacher":
        """A copy that runs as diffusers has it, on the CPU in half precision."""
        network = SanaTransformer2DModel.from_config(self.network.config)
        network.load_state_dict(self.network.state_dict())
        return Teacher(copy.deepcopy(self.text_encoder), network).half().cpu()
