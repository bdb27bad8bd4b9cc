"""From samples to the one batch type: the family's encoding, and samples that were encoded before."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from sprint.base.errors import SprintError
from sprint.data.batch import Encoded, Sample
from sprint.data.batching import collate, encode
from sprint.models.encoders import encode_null
from sprint.models.sana.encoders import SanaEncoders
from tests.tolerance import assert_close, near, of_network, rounding

WORDS = ("red", "green", "blue", "circle", "square", "triangle", "cross", "a", "and")


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
    return SanaEncoders(
        tokenizer, Gemma2Model(config).eval(), autoencoder.eval(), max_length=8, instruction=False
    )


def pictures_of(*levels):
    return [Sample(np.full((16, 16, 3), level, np.uint8), "a red circle") for level in levels]


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
    assert_close(batch.latent, 0.25 * latent, of_network(family.autoencoder.encoder))


def test_encode_keeps_rows_columns_and_channels(family):
    """A picture that differs everywhere meets the encoder as [channel, row, column]."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    seen = []
    hook = family.autoencoder.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encode([Sample(picture, "a")], family)
    hook.remove()
    assert seen[0][0, 2, 5, 1].item() == near(
        picture[5, 1, 2] / 127.5 - 1, rounding(torch.float32, terms=2), scale=1
    )


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
        assert_close(both[1:], one, of_network(family.text_encoder, family.autoencoder.encoder))


@pytest.mark.parametrize("shape", [(18, 18), (16, 18), (18, 16)])
def test_sizes_that_do_not_divide_are_refused(family, shape):
    sample = Sample(np.zeros((*shape, 3), np.uint8), "a")
    with pytest.raises(
        SprintError, match=r"^data.size = 18, but this autoencoder takes multiples of 4 pixels$"
    ):
        encode([sample], family)


def test_pictures_need_not_be_square(family):
    batch = encode([Sample(np.zeros((8, 16, 3), np.uint8), "a")], family)
    assert batch.latent.shape == (1, 4, 2, 4)


def test_the_null_prompt_is_the_empty_one_without_instruction(family):
    text, mask = encode_null(family)
    assert text.shape == (1, 8, 16) and mask.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]
    family.instruction = True
    try:
        behind, _ = family.encode_prompts([""])
        again, _ = encode_null(family)
    finally:
        family.instruction = False
    assert_close(again, text, of_network(family.text_encoder))
    assert (behind - text).abs().max() > 1e-2


# Samples that were encoded before


def encoded(tokens, value=1.0, shape=(4, 2, 2), dtype=torch.float32):
    return Encoded(torch.full(shape, value, dtype=dtype), torch.full((tokens, 3), value, dtype=dtype))


def test_collate_stacks_latents_and_pads_texts_to_a_multiple_of_the_unit():
    batch = collate([encoded(5, 1.0), encoded(2, 2.0)], "cpu", unit=4)
    assert batch.latent.shape == (2, 4, 2, 2) and batch.latent[:, 0, 0, 0].tolist() == [1, 2]
    assert batch.text.shape == (2, 8, 3) and batch.mask.dtype == torch.int64
    assert batch.mask.tolist() == [[1] * 5 + [0] * 3, [1] * 2 + [0] * 6]
    assert batch.text[..., 0].tolist() == [[1.0] * 5 + [0.0] * 3, [2.0] * 2 + [0.0] * 6]


@pytest.mark.parametrize(
    ("tokens", "unit", "max_length", "length"),
    [(4, 4, 0, 4), (5, 4, 6, 6), (9, 4, 6, 6), (0, 4, 6, 4), (300, 16, 300, 300), (17, 16, 300, 32)],
)
def test_length_of_collated_text(tokens, unit, max_length, length):
    batch = collate([encoded(tokens), encoded(0)], "cpu", unit, max_length)
    assert batch.text.shape[1] == batch.mask.shape[1] == length
    assert batch.mask.sum(1).tolist() == [min(tokens, length), 0]


def test_collate_gives_float32_whatever_was_kept():
    batch = collate([encoded(2, 0.5, dtype=torch.bfloat16)], "cpu")
    assert batch.latent.dtype == batch.text.dtype == torch.float32


def test_latents_of_two_shapes_in_one_batch_are_refused():
    with pytest.raises(
        SprintError, match=r"^latents of shapes \(4, 2, 2\) and \(4, 2, 3\) in one batch; set data"
    ):
        collate([encoded(2), encoded(2, shape=(4, 2, 3))], "cpu")


def test_collate_agrees_with_encode(family):
    """Real tokens alone, collated, are what `encode` gives for the batch; padding apart, which nothing reads."""
    captions = ("a red circle and a blue cross", "cross")
    samples = [Sample(s.picture, c) for s, c in zip(pictures_of(1, 2), captions, strict=True)]
    online = encode(samples, family, unit=4)
    kept = [
        Encoded(latent, text[mask.bool()])
        for latent, text, mask in zip(online.latent, online.text, online.mask, strict=True)
    ]
    batch = collate(kept, "cpu", unit=4, max_length=family.max_length)
    torch.testing.assert_close(batch.latent, online.latent, rtol=0, atol=0)
    assert torch.equal(batch.mask, online.mask)
    torch.testing.assert_close(batch.text, online.text * online.mask[..., None], rtol=0, atol=0)
