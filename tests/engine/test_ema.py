import pytest
import torch
from torch import nn

from sprint.engine.ema import Ema
from sprint.engine.held import Held
from sprint.recipe.schema import Optimizer, OptimizerKind
from tests.tolerance import assert_close, near, rounding
from tests.train.test_adapt import kept


def scalar(value: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, value)
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def test_average_moves_by_the_decay():
    model = scalar(1.0)
    ema = Ema(weights(model), decay=0.9)
    nn.init.constant_(model.weight, 2.0)
    seen = []
    for _ in range(3):
        ema.update(weights(model))
        seen.append(ema.shadow["weight"].item())
    assert seen == near([1.1, 1.19, 1.271], rounding(torch.float32, terms=2, steps=3))
    assert model.weight.item() == 2.0 and not ema.shadow["weight"].requires_grad


def test_a_skipped_update_leaves_the_average_to_the_bit():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, dtype=torch.float64))
    ema, plain = Ema(weights(model), decay=0.9), Ema(weights(model), decay=0.9)
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[1].weight)
    before = {name: value.clone() for name, value in ema.shadow.items()}
    ema.update(weights(model), torch.tensor(False))
    assert all(torch.equal(before[name], value) for name, value in ema.shadow.items())
    ema.update(weights(model), torch.tensor(True))
    plain.update(weights(model))
    assert all(torch.equal(plain.shadow[name], value) for name, value in ema.shadow.items())
    assert not torch.equal(before["0.weight"], ema.shadow["0.weight"])


def test_decay_zero_follows_exactly_and_one_is_refused():
    model = scalar(1.0)
    ema = Ema(weights(model), decay=0.0)
    nn.init.constant_(model.weight, 3.25)
    ema.update(weights(model))
    assert ema.shadow["weight"].item() == 3.25
    with pytest.raises(ValueError, match="not 1"):
        Ema(weights(model), decay=1.0)


def test_shadow_of_bf16_weights_is_float32_and_small_moves_add_up():
    model = scalar(1.0, torch.bfloat16)
    ema = Ema(weights(model), decay=0.999)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(100):
        ema.update(weights(model))
    assert ema.shadow["weight"].dtype == torch.float32
    assert ema.shadow["weight"].item() == near(2 - 0.999**100, rounding(torch.float32, terms=2, steps=100))


def test_pieces_average_to_pieces_of_the_average():
    """Whatever rows of a weight a process holds, none included."""
    model = nn.Linear(4, 6)
    cuts = (slice(0, 4), slice(4, 6), slice(6, 6))
    whole = Ema(weights(model), decay=0.75)
    pieces = [Ema({"weight": model.weight[rows]}, decay=0.75) for rows in cuts]
    for _ in range(3):
        nn.init.normal_(model.weight)
        whole.update(weights(model))
        for ema, rows in zip(pieces, cuts, strict=True):
            ema.update({"weight": model.weight[rows]})
    together = torch.cat([ema.shadow["weight"] for ema in pieces])
    assert_close(together, whole.shadow["weight"], rounding(torch.float32, terms=2, steps=3))


def test_state_goes_round_in_place_and_a_missing_name_is_an_error():
    """The trained module knows how its average is held; a checkpoint fills it by name."""
    model = scalar(1.0)
    trained = Held(model, Optimizer(OptimizerKind.adamw, betas=(0.9, 0.99)))
    ema, other = Ema(trained.local(), decay=0.5), Ema({"weight": torch.full((1, 1), 9.0)}, decay=0.5)
    read = kept({f"ema.{name}": tensor for name, tensor in trained.saved(ema.shadow).items()})
    trained.load_into(other.shadow, read, "ema")
    assert other.shadow["weight"].item() == 1.0
    nn.init.constant_(model.weight, 3.0)
    other.update(trained.local())
    assert (other.shadow["weight"].item(), ema.shadow["weight"].item()) == (2.0, 1.0)
    with pytest.raises(KeyError, match=r"average\.weight"):
        trained.load_into(other.shadow, read, "average")
