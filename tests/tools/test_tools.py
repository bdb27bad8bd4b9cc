"""The tools on a CPU: every path that needs no CUDA device, at the smallest scale."""

import json
import math
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from diffusers import AutoencoderDC

from sprint.base.errors import SprintError
from sprint.cli.main import main as sprint_command
from sprint.models.sana.presets import transformer_config
from sprint.recipe.load import load_recipe
from tools.ablations import starts as compare_starts
from tools.bench import measure
from tools.bench import speed as gpu_speed
from tools.gpu import __main__ as gpu_check
from tools.gpu import engines as gpu_engines

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_engine():
    """accelerate fixes its precision once per process unless it is reset."""
    reset_accelerate()
    yield
    reset_accelerate()


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


# ---- gpu_check: engines -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def under_engines(tmp_path_factory):
    """What the script writes, of one process: the paths of several, over gloo."""
    folder = tmp_path_factory.mktemp("engines")
    gpu_engines.main(str(folder), "single", *gpu_engines.SHARED_ENGINES)
    dist.destroy_process_group()
    reset_accelerate()
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


def test_engines_agree_and_go_on_from_their_checkpoints(under_engines):
    held = {kind: found["held"] for kind, found in under_engines.items()}
    assert held == {"single": "Held", "ddp": "Replicated", "fsdp2": "RowSharded"}
    expected = under_engines["single"]["losses"]
    assert len(expected) == gpu_engines.STEPS and len(set(expected)) > 1
    for found in under_engines.values():
        assert found["losses"] == pytest.approx(expected, rel=1e-4)
        assert found["losses_resumed"] == pytest.approx(found["losses"][gpu_engines.SAVED_AFTER :], rel=1e-6)
    assert max(gpu_engines.compare_engines(under_engines).values()) < 1e-4


@pytest.mark.parametrize("place", ["losses", "losses_resumed"])
@pytest.mark.parametrize("wrong", [3.0, math.nan])
def test_an_engine_that_goes_astray_is_named(place, wrong):
    good = {"losses": [1.0] * 6, "losses_resumed": [1.0] * 4}
    assert gpu_engines.compare_engines({"single": good, "ddp": good}) == {"single": 0.0, "ddp": 0.0}
    bad = good | {place: [*good[place][:-1], wrong]}
    with pytest.raises(RuntimeError, match="ddp has other losses than single"):
        gpu_engines.compare_engines({"single": good, "ddp": bad})


def test_engines_are_started_by_torchrun_and_their_failure_is_told(monkeypatch, under_engines):
    started = []

    def write(*arguments: str, folder: Path) -> tuple[int, str]:
        started.append(arguments)
        at = next(i for i, word in enumerate(arguments) if word == "tools.gpu.engines")
        for kind in arguments[at + 2 :]:
            (Path(arguments[at + 1]) / f"{kind}.json").write_text(json.dumps(under_engines[kind]))
        return 0, ""

    monkeypatch.setattr(gpu_check, "run_python", write)
    result = gpu_check.run_engines(processes=2)
    assert result["processes"] == 2 and result["engines"] == under_engines
    alone, together = started
    assert alone[-1] == "single" and "torch.distributed.run" not in alone
    assert together[-2:] == gpu_engines.SHARED_ENGINES and "--nproc_per_node=2" in together
    monkeypatch.setattr(gpu_check, "run_python", lambda *arguments, folder: (1, "no NCCL"))
    with pytest.raises(RuntimeError, match="single ended with code 1: no NCCL"):
        gpu_check.run_engines(processes=1)


# ---- gpu_check: speed -------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_is_measured_by_phase_in_bf16_with_checkpointing():
    overrides = ["distill.batch_size=2", "precision=bf16", "activation_checkpointing=true"]
    overrides += [
        "distill.optimizer={kind: came, lr: 2e-6, betas: [0.9, 0.999, 0.9999]}",
        "text.max_length=6",
    ]
    recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", overrides)
    result = gpu_speed.measure_training("tiny", recipe, pairs=2)
    assert result["latent"] == [2, 8, 8, 8]
    assert result["text"] == [2, 6, 128]
    assert result["weights"] == "random"
    assert list(result["phases"]) == ["G", "D"]
    for phase in result["phases"].values():
        assert phase["timed_updates"] == 2
        assert len(phase["losses"]) == 3
        assert phase["losses_finite"] and phase["skipped_updates"] == 0
        assert phase["median_update_seconds"] > 0
        assert torch.cuda.is_available() or phase["peak_memory_gib"] is None
    json.dumps(result, allow_nan=False)


def test_losses_that_are_not_finite_are_said_and_stay_valid_json():
    updates = [gpu_speed.Update(2.0, None, 1.0, 0.0), gpu_speed.Update(0.5, 2**31, math.nan, 1.0)]
    summary = gpu_speed.summary(updates)
    assert summary["losses"] == [1.0, None] and not summary["losses_finite"]
    assert summary["first_update_seconds"] == 2.0 and summary["median_update_seconds"] == 0.5
    assert summary["peak_memory_gib"] == 2.0 and summary["skipped_updates"] == 1


def test_sampling_latency_is_that_of_one_step():
    result = gpu_speed.measure_sampling("tiny", CPU, torch.bfloat16, tokens=6, calls=5)
    assert result["latent"] == [1, 8, 8, 8] and result["latent_finite"]
    assert result["calls"] == 5
    assert 0 < result["least_milliseconds"] <= result["median_milliseconds"] <= result["most_milliseconds"]


def test_decoder_latency_of_a_small_autoencoder():
    config = gpu_speed.F32C32 | {
        f"{end}_{name}": value
        for end in ("encoder", "decoder")
        for name, value in (("block_out_channels", (32,) * 6), ("layers_per_block", (1,) * 6))
    }
    result = gpu_speed.measure_decoder(config, 2, CPU, torch.float32, calls=5)
    assert result["picture"] == [1, 3, 64, 64]
    assert result["median_milliseconds"] > 0


def test_the_autoencoder_has_the_published_size():
    with torch.device("meta"):
        autoencoder = AutoencoderDC(**gpu_speed.F32C32)
    assert sum(p.numel() for p in autoencoder.parameters()) == 312_250_275


# ---- gpu_check: parts, and the check ------------------------------------------------------------------


@pytest.mark.slow
def test_tiny_distillation_runs_from_teacher_to_page(monkeypatch):
    def in_this_process(*arguments: str, folder: Path) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        sprint_command(list(arguments[arguments.index("distill") :]))
        monkeypatch.chdir(ROOT)
        return 0, ""

    monkeypatch.setattr(gpu_check, "run_python", in_this_process)
    overrides = ("adapt.steps=1", "adapt.batch_size=4", "distill.steps=2", "distill.batch_size=4")
    result = gpu_check.run_tiny((*overrides, "adapt.start=ones", "evaluate.prompts=0"))
    assert list(result["milliseconds_per_step"]) == ["adapt", "distill"]
    assert list(result["last_loss"]) == ["adapt, flow", "distill, G", "distill, D"]
    assert all(math.isfinite(loss) for loss in result["last_loss"].values())
    assert result["columns"] == []


def test_a_run_that_fails_says_why(monkeypatch):
    with pytest.raises(SprintError, match=r"distill\.stepps"):
        gpu_check.run_tiny(("distill.stepps=2",))
    monkeypatch.setattr(
        gpu_check, "run_python", lambda *arguments, folder: (2, "note\n\n sprint: disk full\n")
    )
    with pytest.raises(RuntimeError, match=r"ended with code 2: note \| sprint: disk full"):
        gpu_check.run_tiny()


def test_tests_that_fail_are_skipped_or_missing_are_failures(monkeypatch):
    def pytest_says(code: int, **counts: int) -> dict:
        def write(*arguments: str, folder: Path) -> tuple[int, str]:
            attributes = {
                name: str(counts.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
            }
            root = ElementTree.Element("testsuites")
            ElementTree.SubElement(root, "testsuite", attributes)
            ElementTree.ElementTree(root).write(arguments[-1].removeprefix("--junitxml="))
            return code, "last line"

        monkeypatch.setattr(gpu_check, "run_python", write)
        return gpu_check.run_tests()

    assert pytest_says(0, tests=5) == {"passed": 5}
    for code, counts in ((1, {"tests": 5, "failures": 1}), (0, {"tests": 5, "skipped": 5}), (5, {})):
        with pytest.raises(RuntimeError, match=rf"code {code}.*last line"):
            pytest_says(code, **counts)


def test_a_part_of_its_own_runs_with_this_checkout(tmp_path):
    code, output = gpu_check.run_python(
        "-c", "import sprint; print(sprint.__file__); exit(3)", folder=tmp_path
    )
    assert code == 3
    assert Path(output.strip()) == ROOT / "sprint" / "__init__.py"
    assert gpu_check.last_lines("") == "no output"


def test_the_recipes_of_the_check():
    large = load_recipe(ROOT / "recipes" / f"{gpu_check.PRESET}.yaml", gpu_check.TRAINING_OVERRIDES)
    optimizers = {large.distill.optimizer.kind, large.distill.adversarial.optimizer.kind}
    assert (large.arch, large.precision, optimizers) == ("0.6b", "bf16", {"came"})
    assert (large.distill.batch_size, large.activation_checkpointing) == (4, True)
    assert large.text.max_length == gpu_speed.TEXT_TOKENS == 300
    assert gpu_speed.latent_shape(transformer_config("0.6b")) == (32, 32, 32)
    tiny = load_recipe(ROOT / "recipes" / "tiny.yaml", gpu_check.TINY_OVERRIDES)
    assert (tiny.adapt.steps, tiny.distill.steps, tiny.evaluate.prompts) == (100, 400, 120)


def failing_part(error: Exception) -> gpu_check.Part:
    def fail() -> dict:
        raise error

    return gpu_check.Part(5, "fails", fail)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), SprintError("bad\nrecipe"), RuntimeError("kernel")]
)
def test_a_failure_is_one_line_in_the_record(error):
    outcome = gpu_check.run_part(failing_part(error))
    assert outcome["failure"] == f"{type(error).__name__}: {' '.join(str(error).split())}"
    assert "result" not in outcome


def test_a_part_ends_with_its_time_box():
    began = time.monotonic()
    outcome = gpu_check.run_part(gpu_check.Part(1, "sleeps", lambda: time.sleep(30)))
    assert outcome["failure"] == "OutOfTime: not done within 1 s"
    assert time.monotonic() - began < 5


def test_the_parts_take_at_most_ten_minutes():
    assert sum(part.seconds for part in gpu_check.PARTS.values()) <= 600


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it would do only where there is no CUDA")
def test_without_a_gpu_it_says_what_it_would_do_and_writes_nothing(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "out.json")]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in gpu_check.PARTS)
    assert gpu_check.main(["--only", "decoder", "--out", str(tmp_path / "out.json")]) == 0
    assert "tests" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_record_goes_on_after_a_failure(tmp_path, monkeypatch):
    """main, as if there were a device: the first part fails, the second is there, the exit code tells."""
    parts = {"one": failing_part(RuntimeError("broken")), "two": gpu_check.Part(5, "works", dict)}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "circumstances", lambda: {"commit": "unknown"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    out = tmp_path / "new" / "out.json"
    assert gpu_check.main(["--out", str(out)]) == 1
    record = json.loads(out.read_text())
    assert record["parts"]["one"]["failure"] == "RuntimeError: broken"
    assert record["parts"]["two"]["result"] == {}


def test_what_cannot_be_asked_is_unknown():
    assert measure.first_line_of("no-such-program") == "unknown"
    assert measure.first_line_of(sys.executable, "-c", "raise SystemExit(1)") == "unknown"
    assert measure.first_line_of(sys.executable, "-c", "print('580.1\\nsecond')") == "580.1"


# ---- compare_starts ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_starts_are_trained_and_drawn(tmp_path, capsys):
    arguments = ["--steps", "2", "--batch-size", "4", "--held-out", "1", "--out", str(tmp_path)]
    assert compare_starts.main([str(ROOT / "recipes" / "tiny.yaml"), *arguments]) == 0
    record = json.loads((tmp_path / "compare_starts.json").read_text())
    assert (record["recipe"], record["steps"], record["batch_size"]) == ("tiny", 2, 4)
    starts = record["starts"]
    assert list(starts) == ["calibrated", "ones"]
    for start in starts.values():
        assert len(start["training_losses"]) == 2
        assert start["held_out_after"] != start["held_out_before"]
    # the calibrated start is made to keep the teacher's function; the other one is not
    gaps = {name: abs(start["held_out_before"] - record["teacher"]) for name, start in starts.items()}
    assert gaps["calibrated"] < gaps["ones"]
    drawing = ElementTree.parse(tmp_path / "compare_starts.svg").getroot()
    words = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"calibrated start", "ones start", "teacher, held-out"} <= set(words)
    assert "held-out flow loss" in capsys.readouterr().out


def test_a_recipe_that_is_not_there_is_one_line(capsys):
    assert compare_starts.main(["nowhere.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nowhere.yaml" in said


@pytest.mark.parametrize("tool", [gpu_check, compare_starts])
def test_help_gives_an_example(tool, capsys):
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    assert f"python -m {tool.__name__.removesuffix('.__main__')}" in capsys.readouterr().out
