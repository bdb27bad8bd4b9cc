"""What is wrong with a model: each case made on purpose, and none of it said of models that are well."""

import json
import shutil

import pytest
import torch

from sprint.base.names import BUILT_IN
from sprint.doctor.findings import Level
from sprint.doctor.model import Opening, examine_model
from sprint.doctor.probe import neighbour_correlation
from tests.doctor.cases import WEIGHTS, edited

pytest_plugins = "tests.doctor.fixtures"


def found(findings, level: Level, about: str) -> str:
    """The texts of a level about something, in one."""
    return "\n".join(f"{one.what} → {one.do}" for one in findings if (one.level, one.about) == (level, about))


def troubles(findings) -> list:
    return [one for one in findings if one.level is not Level.ok]


def teachers(pair):
    return str(pair / "teacher")


def test_the_built_in_teacher_and_a_student_that_moved_are_well(pair):
    assert troubles(examine_model("tiny")) == []
    findings = examine_model(str(pair / "student"), against=teachers(pair))
    assert troubles(findings) == []
    assert "0.03 of its norm away" in found(findings, Level.ok, "movement")


def test_a_student_without_an_update_is_its_teacher_bit_for_bit(pair, tmp_path):
    weights = teacher_weights(pair)
    student = edited(pair / "student", tmp_path / "student", lambda name, weight: weights.get(name, weight))
    text = found(examine_model(str(student), against=teachers(pair)), Level.wrong, "movement")
    assert "bit for bit: no update was kept" in text and "half-precision" in text


def teacher_weights(pair) -> dict:
    """The adapted teacher's, under the student's names."""
    from safetensors.torch import load_file

    old, new = "time_embed.emb.timestep_embedder.", "time_embed.timestep_embedder."
    return {name.replace(old, new): weight for name, weight in load_file(pair / "teacher" / WEIGHTS).items()}


def test_a_student_that_hardly_moved(pair, tmp_path):
    weights = teacher_weights(pair)
    student = edited(
        pair / "student", tmp_path / "student", lambda name, weight: weights.get(name, weight) * (1 + 2e-5)
    )
    findings = examine_model(str(student), against=teachers(pair))
    assert "has hardly moved: 2e-05 of its norm" in found(findings, Level.wrong, "movement")


def test_updates_that_bfloat16_weights_lost(pair, tmp_path):
    """Ten steps of lr 2e-6 are below half of bfloat16's spacing for all but the smallest weights."""
    teacher = tmp_path / "teacher"
    edited(pair / "teacher", teacher, lambda name, weight: weight.bfloat16().float())
    weights, generator = teacher_weights(tmp_path), torch.Generator().manual_seed(3)

    def trained(name, weight):
        if name not in weights:
            return weight.bfloat16().float()
        step = 2e-5 * torch.randn(weight.shape, generator=generator).sign()
        return (weights[name].bfloat16() + step.bfloat16()).float()

    student = edited(pair / "student", tmp_path / "student", trained)
    findings = examine_model(str(student), against=str(teacher))
    assert "numbers are still" in found(findings, Level.wrong, "movement")
    assert "half precision" in found(findings, Level.wrong, "movement")
    assert "float32 in name only" in found(findings, Level.note, "dtype")


def test_parts_that_stayed_while_others_moved(pair, tmp_path):
    weights = teacher_weights(pair)
    student = edited(
        pair / "student",
        tmp_path / "student",
        lambda name, weight: weights[name] if ".attn1." in name and name in weights else weight,
    )
    findings = examine_model(str(student), against=teachers(pair))
    assert found(findings, Level.note, "movement").startswith("unchanged bit for bit: attn →")
    assert found(findings, Level.wrong, "movement") == ""


def test_a_teacher_of_another_student(pair, tmp_path):
    generator = torch.Generator().manual_seed(5)
    student = edited(
        pair / "student",
        tmp_path / "student",
        lambda name, weight: weight.std() * torch.randn(weight.shape, generator=generator),
    )
    findings = examine_model(str(student), against=teachers(pair))
    assert "as far as another network" in found(findings, Level.wrong, "movement")
    assert "it is noise" in found(findings, Level.wrong, "prediction")


def test_weights_that_are_not_finite(pair, tmp_path):
    def broken(name, weight):
        if name == "proj_out.weight":
            weight[0, :3] = float("nan")
        return weight

    findings = examine_model(str(edited(pair / "student", tmp_path / "student", broken)), teachers(pair))
    text = found(findings, Level.wrong, "weights")
    assert text.startswith("3 numbers in 1 of 96 tensors are nan or inf: final_layer.linear.weight")
    assert not any(one.about in ("prediction", "movement") for one in findings)


def test_finite_weights_whose_output_is_not(pair, tmp_path):
    student = edited(pair / "student", tmp_path / "student", lambda name, weight: weight * 1e18)
    findings = examine_model(str(student))
    assert "not finite" in found(findings, Level.wrong, "forward")
    assert "beyond float16" in found(findings, Level.note, "dtype")


def test_the_wrong_clock_is_seen_and_named(tmp_path):
    sparse = edited(BUILT_IN["tiny"], tmp_path / "sparse", lambda name, weight: weight)
    (sparse / "transformer" / "trigflow.json").write_text(json.dumps({"time_scale": 1.0}))
    text = found(examine_model(str(sparse)), Level.wrong, "clock")
    assert "with sparse time the prediction looks like a picture" in text and "--time-scale sparse" in text


def test_the_other_wrong_clock(pair):
    findings = examine_model(str(pair / "student"), opening=Opening(time_scale=1000.0))
    assert "--time-scale dense" in found(findings, Level.wrong, "clock")


def test_latents_of_another_scale(pair, tmp_path):
    """Trained without scaling_factor, a network predicts latents of another deviation."""
    scaled = ("proj_out.weight", "proj_out.bias")
    student = edited(
        pair / "student", tmp_path / "student", lambda name, weight: weight * (6 if name in scaled else 1)
    )
    assert "the scale is wrong" in found(examine_model(str(student)), Level.wrong, "prediction")


def test_a_guidance_embedder_without_effect(pair, tmp_path):
    last = "time_embed.guidance_embedder.linear_2"
    student = edited(
        pair / "student", tmp_path / "student", lambda name, weight: weight * (0 if last in name else 1)
    )
    findings = examine_model(str(student))
    assert "the guidance embedder has no effect" in found(findings, Level.wrong, "guidance")


def test_a_network_that_does_not_read_its_prompt(pair, tmp_path):
    student = edited(
        pair / "student", tmp_path / "student", lambda name, weight: weight * (0 if ".attn2." in name else 1)
    )
    findings = examine_model(str(student))
    assert "the network does not read it" in found(findings, Level.wrong, "text")


def test_float16_and_bfloat16_students(pair, tmp_path):
    half = edited(pair / "student", tmp_path / "half", lambda name, weight: weight.half())
    assert found(examine_model(str(half)), Level.note, "dtype").startswith("float16 weights")
    bfloat = edited(pair / "student", tmp_path / "bfloat", lambda name, weight: weight.bfloat16())
    assert found(examine_model(str(bfloat)), Level.note, "dtype").startswith("bfloat16 weights")


def test_encoders_that_are_absent_or_of_another_model(pair, tmp_path):
    student = edited(pair / "student", tmp_path / "student", lambda name, weight: weight)
    config = student / "vae" / "config.json"
    changed = json.loads(config.read_text()) | {"latent_channels": 32, "scaling_factor": None}
    config.unlink()
    config.write_text(json.dumps(changed))
    findings = examine_model(str(student))
    assert "latents 32 wide, the network takes 8" in found(findings, Level.wrong, "encoders")
    assert "scaling_factor is None" in found(findings, Level.note, "encoders")
    shutil.rmtree(student / "vae")
    assert found(examine_model(str(student)), Level.note, "encoders").startswith("no vae beside")


def test_settings_that_cannot_be(pair, tmp_path):
    student = edited(pair / "student", tmp_path / "student", lambda name, weight: weight)
    (student / "sprint.json").unlink()
    (student / "sprint.json").write_text('{"text": {"max_length": "long"}}')
    assert "max_length" in found(examine_model(str(student)), Level.wrong, "settings")


def test_a_file_that_does_not_open_and_a_teacher_that_is_none(tmp_path, pair):
    file = tmp_path / "student.safetensors"
    file.write_bytes(b"no weights")
    assert str(file) in found(examine_model(str(file)), Level.wrong, "model")
    findings = examine_model(str(pair / "student"), against=str(file))
    assert str(file) in found(findings, Level.wrong, "teacher")


def test_neighbours_of_noise_and_of_a_slope():
    noise = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    # 2 · 4 · 2 · 32 · 31 pairs: a standard deviation of 0.008
    assert abs(neighbour_correlation(noise)) < 0.04
    slope = torch.arange(32.0).expand(2, 4, 32, 32)
    assert neighbour_correlation(slope) > 0.9
    assert neighbour_correlation(torch.zeros(1, 1, 4, 4)) == 0


@pytest.mark.parametrize("name", ["tiny"])
def test_the_network_is_cut_where_memory_is_short(name, monkeypatch):
    class Short:
        available = 1000

    monkeypatch.setattr("sprint.doctor.probe.psutil.virtual_memory", Short)
    assert "first 2 blocks only" in found(examine_model(name), Level.note, "forward")
