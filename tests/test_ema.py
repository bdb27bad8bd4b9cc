import pytest
import torch
from torch import nn

from sprint.ema import Ema


def scalar(value: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, value)
    return model


def test_average_moves_by_the_decay():
    model = scalar(1.0)
    ema = Ema(model, decay=0.9)
    nn.init.constant_(model.weight, 2.0)
    seen = []
    for _ in range(3):
        ema.update(model)
        seen.append(ema.shadow["weight"].item())
    assert seen == pytest.approx([1.1, 1.19, 1.271])
    assert model.weight.item() == 2.0


def test_a_skipped_update_leaves_the_average_to_the_bit():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, dtype=torch.float64))
    ema, plain = Ema(model, decay=0.9), Ema(model, decay=0.9)
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[1].weight)
    before = {name: value.clone() for name, value in ema.shadow.items()}
    ema.update(model, torch.tensor(False))
    assert all(torch.equal(before[name], value) for name, value in ema.shadow.items())
    ema.update(model, torch.tensor(True))
    plain.update(model)
    assert all(torch.equal(plain.shadow[name], value) for name, value in ema.shadow.items())
    assert not torch.equal(before["0.weight"], ema.shadow["0.weight"])


def test_decay_zero_follows_exactly_and_one_is_refused():
    model = scalar(1.0)
    ema = Ema(model, decay=0.0)
    nn.init.constant_(model.weight, 3.25)
    ema.update(model)
    assert ema.shadow["weight"].item() == 3.25
    with pytest.raises(ValueError, match="not 1"):
        Ema(model, decay=1.0)


def test_shadow_of_bf16_weights_is_float32_and_small_moves_add_up():
    model = scalar(1.0, torch.bfloat16)
    ema = Ema(model, decay=0.999)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(100):
        ema.update(model)
    assert ema.shadow["weight"].dtype == torch.float32
    assert ema.shadow["weight"].item() == pytest.approx(2 - 0.999**100, rel=1e-4)


def test_applied_swaps_and_returns_even_after_an_error():
    model = scalar(1.0)
    ema = Ema(model, decay=0.5)
    nn.init.constant_(model.weight, 3.0)
    ema.update(model)
    with ema.applied(model):
        assert model(torch.ones(1, 1)).item() == 2.0
    assert model.weight.item() == 3.0
    with pytest.raises(KeyError), ema.applied(model):
        raise KeyError
    assert model.weight.item() == 3.0
    ema.copy_to(model)
    assert model.weight.item() == 2.0


def test_state_goes_round_and_a_wrong_one_is_named():
    model = scalar(1.0)
    ema, other = Ema(model, decay=0.5), Ema(scalar(9.0), decay=0.5)
    other.load_state_dict(ema.state_dict())
    assert other.shadow["weight"].item() == 1.0
    nn.init.constant_(model.weight, 3.0)
    other.update(model)
    assert (other.shadow["weight"].item(), ema.shadow["weight"].item()) == (2.0, 1.0)
    with pytest.raises(ValueError, match="'bias'"):
        other.load_state_dict({**ema.state_dict(), "bias": torch.zeros(1)})
