"""A healthy teacher, a healthy student of it and a run around them, made in seconds without training."""

import json
from pathlib import Path

import pytest
import torch

from sprint.base.names import BUILT_IN
from sprint.data.batch import Batch
from sprint.models.families import family_of, load_family
from sprint.models.student import from_adapted
from sprint.recipe.load import load_recipe, recipe_hash, recipe_text
from sprint.train.start import fit_dense_time, measure_qk_rms, with_ones
from sprint.weights.export import export_student, export_teacher
from sprint.weights.load import load_teacher
from tests.doctor.cases import edited, rows

STEP = 0.03  # of a weight's own size: what a short training moves it by


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Path:
    """teacher/ and student/: the built-in teacher in dense time, and the same moved a little."""
    folder = tmp_path_factory.mktemp("pair")
    teacher, scale = load_teacher(BUILT_IN["tiny"])
    generator = torch.Generator().manual_seed(0)
    text, mask = torch.randn(4, 8, 128, generator=generator), torch.ones(4, 8, dtype=torch.long)
    latent = torch.randn(4, 8, 8, 8, generator=generator)
    norms = measure_qk_rms(teacher, [(latent, torch.full((4,), 0.5), Batch(latent, text, mask))], scale)
    adapted = with_ones(teacher)
    for name, rms in norms.items():
        torch.nn.init.constant_(adapted.get_parameter(name), rms)
    fit_dense_time(*family_of(adapted).time_mlp(adapted), scale, steps=200, points=128)
    family = load_family("tiny", 32, False)
    export_teacher(folder / "teacher", adapted, family, {})
    student = from_adapted(adapted)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            size = 1.0 if "guidance_embedder" in name else weight.square().mean().sqrt()
            weight += STEP * size * torch.randn(weight.shape, generator=generator)
    export_student(folder / "student", student, None, family, {})
    return folder


@pytest.fixture
def run(pair, tmp_path):
    """`run(rows, "key=value", …)` -> a finished run's folder with these rows; `student` edits its weights."""

    def make(lines: list[dict] | None = None, *overrides: str, student=None) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        recipe = load_recipe("tiny", ["distill.ema_decay=0", *overrides])
        (folder / "recipe.yaml").write_text(recipe_text(recipe))
        (folder / "recipe.hash").write_text(recipe_hash(recipe))
        text = "".join(json.dumps(row) + "\n" for row in (rows() if lines is None else lines))
        (folder / "metrics.jsonl").write_text(text)
        (folder / "teacher").symlink_to(pair / "teacher")
        edited(pair / "student", folder / "student", student or (lambda name, weight: weight))
        return folder

    return make
