"""trigflow.json: which network a folder holds and what its clock is. `convert` and `export` write it."""

from pathlib import Path

from sprint.maths.trigflow import SIGMA_DATA
from sprint.weights.checkpoint import Checkpoint
from sprint.weights.folder import write_json
from sprint.weights.sources import TRIGFLOW_FILE


def trigflow_facts(checkpoint: Checkpoint, trained: bool = False) -> dict:
    """What every trigflow.json says; one of a network that was trained here need not say what told its numbers."""
    family, sizes = checkpoint.family, checkpoint.sizes
    heads = family.heads_field.removeprefix("num_")
    return {
        "time": checkpoint.time,
        "time_scale": checkpoint.time_scale,
        "time_scale_from": "training" if trained else checkpoint.time_scale_from,
        "sigma_data": SIGMA_DATA,
        "network": {
            "depth": sizes.depth,
            "width": sizes.width,
            "parameters": checkpoint.parameters,
            heads: checkpoint.config[family.heads_field],
            **({} if trained else {f"{heads}_from": checkpoint.heads_from}),
            "qk_norm": family.has_qk_norm(checkpoint.config),
            "guidance": checkpoint.is_student,
        },
        "tensors": {"network": len(checkpoint.network), "extra": checkpoint.extras},
    }


def write_trigflow(folder: Path, facts: dict) -> None:
    """folder   the network's own"""
    write_json(folder / TRIGFLOW_FILE, facts)
