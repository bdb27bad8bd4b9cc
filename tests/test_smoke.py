"""Both stages end to end on the shipped family, and the first losses of both on random networks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaSprintPipeline

from sprint.evaluate.metrics import fid
from sprint.recipe.load import load_recipe
from sprint.train.adapt import AdaptStage
from sprint.train.distill import DistillStage
from sprint.train.log import METRICS, read_metrics
from sprint.train.run import distill
from tests.tiny import LATENT, tiny_batch, tiny_network, tiny_null, tiny_recipe
from tests.tolerance import of_network

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "losses.txt"
FEW = [
    *("name=smoke", "adapt.steps=4", "adapt.batch_size=8", "distill.steps=6", "distill.batch_size=8"),
    *("log_every=1", "evaluate.prompts=12", "evaluate.steps=[1, 2]", "evaluate.teacher_steps=4"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run of recipes/tiny.yaml cut to a few steps; FID against 100 scenes."""
    root = tmp_path_factory.mktemp("runs")
    recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", FEW)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fid, "REFERENCE_SCENES", 100)
        first = distill(recipe, root, "sprint distill tiny")
        student = root / "smoke" / "student" / "transformer" / "diffusion_pytorch_model.safetensors"
        written = student.stat().st_mtime_ns
        again = distill(recipe, root, "sprint distill tiny")
    assert first == again and student.stat().st_mtime_ns == written  # nothing is done twice
    return root / "smoke"


def test_the_student_opens_in_diffusers_and_draws(finished):
    pipeline = SanaSprintPipeline.from_pretrained(finished / "student", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    (picture,) = pipeline(
        "a red circle", num_inference_steps=2, height=64, width=64, generator=generator, output_type="np",
        max_sequence_length=32, complex_human_instruction=None, use_resolution_binning=False,
    ).images  # fmt: skip
    assert picture.shape == (64, 64, 3)
    assert np.isfinite(picture).all() and picture.std() > 0.01


def test_both_stages_were_logged_and_their_losses_are_finite(finished):
    rows = read_metrics(finished / METRICS)
    assert [(row["stage"], row["phase"]) for row in rows] == [("adapt", "flow")] * 4 + [
        ("distill", phase) for phase in "GDGDGD"
    ]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    assert all(row["loss"] is not None and row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows)


def test_the_page_has_every_column(finished):
    html = (finished / "report.html").read_text()
    assert "smoke" in html and "data:image/" in html
    report = json.loads((finished / "report.json").read_text())
    assert len(report["columns"]) == 4  # teacher, undistilled, student at 1 and 2 steps
    assert (finished / "samples.png").stat().st_size > 1000
    costs = json.loads((finished / "costs.json").read_text())
    assert set(costs["seconds"]) == {"adapt", "distill", "evaluate"}
    assert 0 < costs["peak_memory"] < 4e9


# ---- golden losses --------------------------------------------------------------------------------------


def first_losses(engine, steps: int = 6) -> list[tuple[str, float, float]]:
    """The first logged losses of both stages, on networks and batches made from seeds.  -> update, loss, promise"""
    recipe, found = tiny_recipe(), []
    stages = (
        AdaptStage(recipe, engine, tiny_network(), tiny_null()),
        DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT),
    )
    update = of_network(tiny_network(), passes=4)  # forward, tangent, and backward twice
    for stage in stages:
        for step in range(steps):
            loss = stage.update(step, tiny_batch(seed=step)).read(engine)["loss"]
            promise = (step + 1) * update * max(1.0, abs(loss))  # each update adds what its passes err
            found.append((f"{stage.name} {step + 1} {stage.phase(step)}", loss, promise))
    return found


def test_the_first_losses_are_golden(engine):
    """A change that should not alter numerics shows the same losses, as far as the file promises their digits.

    Where it should, rewrite the file and look at the difference:
        UPDATE_GOLDEN=1 pytest tests/test_smoke.py -k golden
    """
    ours = first_losses(engine)
    header, *kept = [line for line in GOLDEN.read_text().splitlines() if line]
    while kept[0].startswith("#"):
        header += "\n" + kept.pop(0)
    if os.environ.get("UPDATE_GOLDEN"):
        kept = [f"{update} {loss:.6f} ± {promise:.6f}" for update, loss, promise in ours]
        GOLDEN.write_text("\n".join([header, *kept]) + "\n")
    golden = [line.rsplit(maxsplit=3) for line in kept]
    assert [update for update, *_ in ours] == [update for update, *_ in golden]
    for (update, loss, promise), (_, expected, _, promised) in zip(ours, golden, strict=True):
        assert float(promised) == pytest.approx(promise, rel=0.1), update  # the file's own is of the helper
        assert loss == pytest.approx(float(expected), rel=0, abs=float(promised)), update
