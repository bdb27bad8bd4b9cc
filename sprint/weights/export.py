"""Folders that diffusers opens: a student as `SanaSprintPipeline`, an adapted teacher as `SanaPipeline`.

DIR/model_index.json, scheduler, tokenizer, text_encoder, vae   as diffusers writes them
DIR/transformer   the network, trigflow.json (its clock), logvar.safetensors (a student's loss weighting)
DIR/sprint.json   text settings and picture size, which `sprint sample` reads
DIR/README.md     the model card
"""

from pathlib import Path

from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from safetensors.torch import save_file
from torch import nn

from sprint.base.errors import SprintError
from sprint.maths.trigflow import SIGMA_DATA
from sprint.models.encoders import Family
from sprint.models.view import DENSE_TIME, SPARSE_TIME
from sprint.weights.card import Facts, write_card
from sprint.weights.checkpoint import understand
from sprint.weights.folder import complete_or_absent, read_json, write_json
from sprint.weights.load import build_network
from sprint.weights.settings import SETTINGS_FILE
from sprint.weights.sources import SIDE_FILES, TRIGFLOW_FILE

LOGVAR_FILE = SIDE_FILES[1]
LOGVAR_KEYS = {"weight": "logvar_linear.weight", "bias": "logvar_linear.bias"}  # Sana-Sprint's own names
SANA_SHIFT = 3.0  # of the flow times that Sana's sampler walks


# ---- the two exports ----------------------------------------------------------------------------------


def export_student(
    folder: Path, network: SanaTransformer2DModel, logvar: nn.Linear | None, family: Family, facts: Facts
) -> Path:
    """Write a student as a folder that `SanaSprintPipeline.from_pretrained` opens offline.  -> folder

    network   embeds guidance and has dense time; weights are written in the dtype they have
    logvar    Linear(width, 1) of the adaptive loss weighting, for training on; None leaves it out

    Whole or not at all: an earlier export gives way only to a complete one. Raises SprintError for a network
    without guidance, a folder of something else, and a full or read-only disk.
    """
    if not network.config.guidance_embeds:
        raise SprintError(f"{folder}: a student embeds guidance and this network does not; export a teacher")
    parts = family.tokenizer, family.text_encoder, family.autoencoder, network
    with complete_or_absent(Path(folder)) as place:
        _save_pipeline(SanaSprintPipeline(*parts, SCMScheduler(sigma_data=SIGMA_DATA)), place)
        if logvar is not None:
            head = {name: getattr(logvar, part).detach().contiguous() for part, name in LOGVAR_KEYS.items()}
            save_file(head, place / "transformer" / LOGVAR_FILE, {"format": "pt"})
        _write_about(place, network, family, facts)
        write_card(place, facts, Path(folder).absolute().name)
    return Path(folder)


def export_teacher(folder: Path, network: SanaTransformer2DModel, family: Family, facts: Facts) -> Path:
    """Write an adapted teacher as a folder that `SanaPipeline.from_pretrained` opens offline.  -> folder

    network   embeds no guidance and has dense time, which is also written as diffusers' `timestep_scale`, so
              that `SanaPipeline` itself keeps the clock

    Otherwise as `export_student`.
    """
    if network.config.guidance_embeds:
        raise SprintError(f"{folder}: this network embeds guidance, as students do; a teacher does not")
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=SANA_SHIFT
    )
    parts = family.tokenizer, family.text_encoder, family.autoencoder, network
    with complete_or_absent(Path(folder)) as place:
        _save_pipeline(SanaPipeline(*parts, scheduler), place)
        config = place / "transformer" / "config.json"
        write_json(config, read_json(config) | {"timestep_scale": DENSE_TIME / SPARSE_TIME})
        _write_about(place, network, family, facts)
        write_card(place, facts, Path(folder).absolute().name)
    return Path(folder)


def load_student(folder: str | Path) -> tuple[SanaTransformer2DModel, nn.Linear | None]:
    """Network in fp32 and eval mode, and the logvar head if the folder has one. Raises SprintError."""
    checkpoint = understand(folder)
    if not checkpoint.config["guidance_embeds"]:
        raise SprintError(f"{folder} is a teacher (it embeds no guidance); a student is needed here")
    network = build_network(checkpoint)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()  # free of the file, which a later export may replace
    extras = dict(checkpoint.stream_extras())
    if not set(LOGVAR_KEYS.values()) <= extras.keys():
        return network, None
    logvar = nn.Linear(checkpoint.width, 1)
    logvar.load_state_dict({part: extras[name].float() for part, name in LOGVAR_KEYS.items()})
    return network, logvar


# ---- files --------------------------------------------------------------------------------------------


def _save_pipeline(pipeline: DiffusionPipeline, place: Path) -> None:
    """What diffusers writes, less the folders of this machine that the parts were once loaded from."""
    try:
        pipeline.save_pretrained(place)
    except Exception as error:
        if type(error) is Exception:  # how tokenizers reports a full disk
            raise OSError(str(error)) from error
        raise
    for config in place.glob("*/config.json"):
        content = read_json(config)
        if content.pop("_name_or_path", None) is not None:
            write_json(config, content)


def _write_about(place: Path, network: SanaTransformer2DModel, family: Family, facts: Facts) -> None:
    """trigflow.json, with the fields that `convert` writes, from the files just written; and sprint.json."""
    checkpoint = understand(place, DENSE_TIME)
    config = checkpoint.config
    clock = {
        "time": checkpoint.time,
        "time_scale": checkpoint.time_scale,
        "time_scale_from": "training",
        "sigma_data": SIGMA_DATA,
        "network": {
            "depth": config["num_layers"],
            "width": checkpoint.width,
            "parameters": network.num_parameters(),
            "cross_attention_heads": config["num_cross_attention_heads"],
            "qk_norm": config["qk_norm"] is not None,
            "guidance": config["guidance_embeds"],
        },
        "tensors": {"network": len(checkpoint.network), "extra": checkpoint.extras},
    }
    text = {"max_length": family.max_length, "instruction": family.instruction}
    size = config["sample_size"] * family.downscale
    settings = {"text": text, "size": size, "recipe": facts.get("recipe")}
    if facts.get("times"):
        settings["times"] = [list(times) for times in facts["times"]]
    write_json(place / "transformer" / TRIGFLOW_FILE, clock)
    write_json(place / SETTINGS_FILE, settings)
