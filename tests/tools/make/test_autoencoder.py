"""The latents' scale: what is off it, how it is divided out, and how large values get inside."""

import pytest
import torch

from sprint.lab.series import AUTOENCODER_SEEDS
from tests.tolerance import assert_close, of_network
from tools.make.autoencoder import build, divide_latents, largest_inside, off_scale, pictures, to_unit


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return build().double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def shown():
    return to_unit(pictures(AUTOENCODER_SEEDS[5], 4)).double()


@pytest.mark.parametrize("scale", [0.25, 3.7])
def test_divided_latents_decode_to_the_same_pictures(autoencoder, shown, scale):
    latent, picture = autoencoder.encode(shown).latent, autoencoder(shown).sample
    other = build().double().eval()
    other.load_state_dict(autoencoder.state_dict())
    divide_latents(other, scale)
    near = of_network(other)
    assert_close(other.encode(shown).latent, latent / scale, near)
    assert_close(other(shown).sample, picture, near)
    assert (other.encode(shown).latent - latent).abs().max() > 0.1 * latent.abs().max()


def test_what_is_off_scale():
    at_scale = torch.tensor([1.0, -1.0]).repeat(2, 3, 4, 1)
    assert off_scale(at_scale) == 0
    assert off_scale(2 * at_scale) == 9  # (4 − 1)²
    one_channel = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None]
    assert off_scale(at_scale + one_channel).item() == pytest.approx(1 / 3 + 1 / 9)


def test_the_largest_value_is_found_wherever_it_is(autoencoder, shown):
    assert largest_inside(autoencoder, shown) < 1e3
    middle = autoencoder.decoder.up_blocks[1][0].conv
    handle = middle.register_forward_hook(lambda _, __, out: out.fill_(-7e4))
    assert largest_inside(autoencoder, shown) >= 7e4
    handle.remove()
