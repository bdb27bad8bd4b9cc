"""A run that took no training, for the tests of `sprint evaluate`."""

import pytest

from sprint.export import export_student, export_teacher
from tests.test_generate import mini_family, mini_network


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
