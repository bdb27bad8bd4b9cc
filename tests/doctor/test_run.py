"""What is wrong with a run: its log and its weights, each case made on purpose."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sprint.doctor.curves import examine_curves, updates
from sprint.doctor.findings import Level
from sprint.doctor.run import _seen, examine_run
from sprint.engine.checkpoint import Saver
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import AdversarialLoss, Recipe
from tests.doctor.cases import WEIGHTS, rows
from tests.doctor.test_model import found, troubles

pytest_plugins = "tests.doctor.fixtures"


def worst(phase: str, about: str, level: Level = Level.wrong, count: int = 12, **changes) -> str:
    """What is said of a calm log in which these numbers of a phase are others."""
    return found(examine_curves(rows(count, **{phase: changes}), None), level, about)


# ---- the log ------------------------------------------------------------------------------------------


def test_a_calm_log_is_well():
    findings = examine_curves(rows(), None)
    assert troubles(findings) == []
    assert {one.about for one in findings} == {"updates", "gradient", "loss", "tangent", "heads"}


def test_updates_are_counted_by_their_kind():
    assert updates(rows(12), "G") == updates(rows(12), "D") == 12
    assert updates([row for row in rows(12) if row["phase"] == "G"], "G") == 23  # no heads: every step is one
    assert updates([], "G") == 0
    log = [{"step": k + 1, "phase": "GDFF"[k % 4]} for k in range(30) if k // 4 % 3 == 0]  # every third round
    assert [updates(log, phase) for phase in "GDF"] == [7, 7, 14]  # 27 and 28 are of the seventh round
    assert updates(log[:3], "F") == 1


def test_every_update_skipped_and_a_few():
    text = worst("G", "updates", skipped=lambda k: k + 1)
    assert "the student: 12 of 12 updates were skipped" in text and "lower the learning rate" in text
    assert worst("G", "updates", skipped=lambda k: k == 11) == ""
    assert "1 of 12" in worst("G", "updates", Level.note, skipped=lambda k: k == 11)


def test_losses_that_are_not_finite_or_never_change():
    text = worst("G", "loss", loss=lambda k: None if k > 5 else 2.0)
    assert "not finite in 6 of 12 lines, first at step 13" in text
    assert "never changes" in worst("G", "loss", loss=lambda k: 0.6931)


def test_gradients_that_vanish_or_explode():
    assert "nothing is learned" in worst("G", "gradient", grad_norm=lambda k: 0.0)
    assert "saturated" in worst("D", "gradient", grad_norm=lambda k: 0.0)
    assert "explodes" in worst("G", "gradient", grad_norm=lambda k: 3.0**k)


def test_a_tangent_that_explodes():
    assert "explodes" in worst("G", "tangent", tangent_norm=lambda k: 10.0 * 3**k)
    assert "not finite in 1 of 12" in worst("G", "tangent", tangent_norm=lambda k: None if k == 4 else 12.0)


def test_dead_heads():
    """The hinge ½(relu(1 − real) + relu(1 + fake)): 0 beyond ±1, and 1 where both logits are 0."""
    sure = {"loss": lambda k: 0.001 * (k % 2), "logit_real": lambda k: 3.0, "logit_fake": lambda k: -3.0}
    assert "dead, they tell every picture apart" in worst("D", "heads", **sure)
    blind = {"loss": lambda k: 1 + 1e-3 * (k % 2), "logit_real": lambda k: 0.0, "logit_fake": lambda k: 0.0}
    assert "dead, they say the same of every picture" in worst("D", "heads", **blind)
    swapped = {"logit_real": lambda k: -0.2, "logit_fake": lambda k: 0.2}
    assert "take generated pictures for real" in worst("D", "heads", Level.note, **swapped)


def test_dead_heads_of_the_relativistic_loss():
    """ln 2 where every logit is 0, which is a loss like any other for the hinge."""
    recipe = Recipe()
    recipe.distill.adversarial.loss = AdversarialLoss.relativistic
    of_blind = {"loss": lambda k: 0.693 + 1e-3 * (k % 2)}
    blind = rows(D=of_blind | {"logit_real": lambda k: 0.0, "logit_fake": lambda k: 0.0})
    said = found(examine_curves(blind, recipe), Level.wrong, "heads")
    assert "relativistic loss 0.69" in said and "they say the same of every picture" in said
    assert found(examine_curves(blind, None), Level.wrong, "heads") == ""


# ---- the folder ---------------------------------------------------------------------------------------


def test_a_healthy_run_is_well_but_for_its_evaluation(run):
    findings = examine_run(run())
    assert [one.about for one in troubles(findings)] == ["evaluation"]
    assert "384 in all" in found(findings, Level.ok, "seen")  # 12 updates of 32 pictures
    assert "away from the adapted teacher" in found(findings, Level.ok, "movement")


def test_states_are_not_called_pictures():
    rows = [{"stage": "distill", "phase": "G", "step": step} for step in (1, 2, 3)]
    recipe = load_recipe(
        "tiny",
        ["distill.trajectories.states=4", "distill.adversarial.weight=0", "distill.self_consistency=0"],
    )
    (finding,) = _seen(rows, recipe)
    assert "3 updates of 32 states of 8 trajectories, 96 in all" in finding.what


def test_a_run_whose_student_never_moved(run, pair):
    """Sana#300: noise after 50 epochs, checkpoints of all steps unchanged, every update skipped."""
    old, new = "time_embed.emb.timestep_embedder.", "time_embed.timestep_embedder."
    teacher = {k.replace(old, new): v for k, v in load_file(pair / "teacher" / WEIGHTS).items()}
    skipped = rows(G={"skipped": lambda k: k + 1, "loss": lambda k: None, "grad_norm": lambda k: None})
    folder = run(
        skipped,
        "distill.batch_size=8",
        student=lambda name, weight: teacher.get(name, torch.zeros_like(weight)),
    )
    findings = examine_run(folder)
    assert "no update was kept" in found(findings, Level.wrong, "movement")
    assert "12 of 12 updates were skipped" in found(findings, Level.wrong, "updates")
    assert "has no effect" in found(findings, Level.wrong, "guidance")
    assert "mostly noise" in found(findings, Level.note, "seen")


def test_an_average_that_is_still_the_start(run):
    text = found(examine_run(run(None, "distill.ema_decay=0.9999")), Level.wrong, "average")
    assert (
        "the start counts 99.9%" in text and "distill.ema_decay to at most 0.7791" in text
    )  # 0.05 ** (1/12)


def test_a_run_without_its_teacher(run, pair):
    folder = run()
    (folder / "teacher").unlink()
    assert "--against" in found(examine_run(folder), Level.note, "movement")
    findings = examine_run(folder, against=str(pair / "teacher"))
    assert "of its norm away" in found(findings, Level.ok, "movement")


def test_files_of_the_run_that_are_damaged(run):
    folder = run()
    (folder / "recipe.yaml").write_text("name: [")
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    (folder / "bad_samples.jsonl").write_text('{"where": "a.png", "reason": "empty caption", "detail": ""}\n')
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "result.json").write_text("[]")
    findings = examine_run(folder)
    for about in ("recipe", "log", "evaluation"):
        assert found(findings, Level.wrong, about), about
    assert "1 empty caption" in found(findings, Level.note, "data")


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_that_goes_on_is_looked_at_in_its_checkpoint(run, broken):
    folder = run()
    weights = load_file(folder / "student" / WEIGHTS)
    shutil.rmtree(folder / "student")
    if broken:
        weights["proj_out.bias"][0] = torch.inf
    tensors = {f"student.weights.student.view.network.{name}": weight for name, weight in weights.items()}
    tensors |= {f"ema.student.view.network.{name}": weight for name, weight in weights.items()}
    saver = Saver(folder / "checkpoints" / "distill")
    saver.save("distill-24", tensors, {"generator_updates": 12})
    saver.wait()
    findings = examine_run(folder)
    assert "no student yet" in found(findings, Level.note, "state")
    assert "000001-distill-24" in found(findings, Level.ok, "checkpoints")
    if broken:
        assert "final_layer.linear.bias" in found(findings, Level.wrong, "weights")
    else:
        moved = found(findings, Level.ok, "movement")
        assert "the student is 0.03" in moved and "its average is 0.03" in moved


def test_a_checkpoint_that_cannot_be_read(run):
    folder = run()
    shutil.rmtree(folder / "student")
    saver = Saver(folder / "checkpoints" / "distill")
    saver.save("distill-24", {"student.weights.x": torch.zeros(2)}, {"generator_updates": 12})
    saver.wait()
    (folder / "checkpoints" / "distill" / "000001-distill-24" / ".metadata").write_bytes(b"torn")
    assert "cannot read checkpoint" in found(examine_run(folder), Level.wrong, "checkpoints")


def test_a_run_that_logged_nothing(run):
    folder = run([])
    shutil.rmtree(folder / "student")
    findings = examine_run(folder)
    assert "nothing was logged" in found(findings, Level.note, "state")
    assert found(findings, Level.note, "checkpoints").startswith("none")
    json.dumps([one._asdict() for one in findings])
