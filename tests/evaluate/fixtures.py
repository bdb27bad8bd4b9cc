"""A run that took no training, and a meter without networks, for the tests of `sprint evaluate`."""

import pytest

from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate import run
from sprint.evaluate.choices import Options
from sprint.evaluate.metrics.metric import Choices, Metric
from sprint.evaluate.prompts import Prompts
from sprint.evaluate.result import Figure, Measured, Shot
from sprint.weights.export import export_student, export_teacher
from tests.sample.test_generate import mini_family, mini_network


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A run of random weights: a student and a teacher for pictures of 64 px, and a recipe."""
    folder = tmp_path_factory.mktemp("runs") / "mini"
    for name, export in (("student", export_student), ("teacher", export_teacher)):
        network = mini_network(qk_norm=True, guidance_embeds=name == "student")
        network.register_to_config(sample_size=16)
        rest = (None,) if name == "student" else ()
        export(folder / name, network, *rest, mini_family(80), {})
    (folder / "recipe.yaml").write_text("name: mini\n")
    return folder


def options(model, tmp_path, **changes) -> Options:
    """Everything goes under tmp_path/out."""
    kept = {"kept": tmp_path / "kept", "kept_real": tmp_path / "real"}
    choices = Choices(**kept | changes.pop("choices", {}))
    return Options(str(model), tmp_path / "out", choices, **changes)


class Fake:
    """A meter that counts pictures, or fails."""

    size = None

    def __init__(self, name, missing=None, problem=None, shots=(("a dot", 0), ("two dots", 1))):
        self.metric = Metric(name, name, "", higher=True)
        self.missing, self.problem, self.opened = missing, problem, 0
        self.shots = [Shot(*shot) for shot in shots]

    def find(self):
        return Prompts("prompts", "2 prompts", self.shots)

    def open(self):
        self.opened += 1
        if self.missing:
            raise NotHereError(self.missing)

    def protocol(self):
        return {"pictures": "2 prompts"}

    def measure(self, drawn):
        if self.problem:
            raise SprintError(self.problem)
        return Measured({"pictures": Figure(sum(len(b) for b in drawn.batches("counting")))})


@pytest.fixture
def fakes(monkeypatch):
    """`fakes(Fake(…), …)`: these are all the meters there are."""

    def use(*found):
        monkeypatch.setattr(run, "make_meters", lambda *_: list(found))

    return use
