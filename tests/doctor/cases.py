"""Cases of the doctor's tests: a calm log, and a model's folder with weights changed on purpose."""

from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def rows(count: int = 12, **changes) -> list[dict]:
    """A calm metrics.jsonl of stage 2; changes: {"G": {"loss": f(k)}}, by phase and name, of row number k."""
    found = []
    for k in range(count):
        wave = (-1) ** k * 0.1
        student = {"loss": 2 + wave, "grad_norm": 1 + wave, "tangent_norm": 12 + wave, "skipped": 0}
        heads = {
            "loss": 0.8 + wave,
            "grad_norm": 0.4 + wave,
            "logit_real": 0.4,
            "logit_fake": 0.0,
            "skipped": 0,
        }
        for phase, values, step in (("G", student, 2 * k + 1), ("D", heads, 2 * k + 2)):
            changed = {name: change(k) for name, change in changes.get(phase, {}).items()}
            found.append({"stage": "distill", "step": step, "phase": phase, "seconds": k} | values | changed)
    return found


def edited(model: Path, folder: Path, change) -> Path:
    """A copy of a model's folder whose weights are change(name, weight)."""
    for file in sorted(model.rglob("*")):
        place = folder / file.relative_to(model)
        if file.is_dir():
            place.mkdir(parents=True)
        elif file != model / WEIGHTS:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file)
    weights = {name: change(name, weight) for name, weight in load_file(model / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    return folder
