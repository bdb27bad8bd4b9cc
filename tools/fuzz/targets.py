"""What is fuzzed: for every kind of file that a verb reads, a small valid one, how it is mutated, and the command."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from PIL import Image
from safetensors.torch import save_file

from sprint.base.names import BUILT_IN
from sprint.models.sana.presets import transformer_config
from tools.fuzz.mutate import BYTES, JSON, LEGACY, SAFETENSORS, TEXT, TORCH, Mutation

TINY = BUILT_IN["tiny"]
CONVERT = ("convert", "FILE", "-o", "out")
SAMPLE = ("sample", "model", "--prompt", "a red circle", "--steps", "1", "--out", "out")
RUN = (
    "name=r",
    "adapt.steps=1",
    "distill.steps=2",
    "adapt.batch_size=4",
    "distill.batch_size=4",
    "evaluate.prompts=0",
)
DATA = (
    "cache",
    "tiny",
    "data.path=data",
    "data.size=64",
    "data.bad_share=0.9",
    "evaluate.prompts=0",
    "-o",
    "out",
)
EVALUATE = ("evaluate", "tiny", "--metrics", "scenes", "--count", "2", "--steps", "1", "--out", "e")
PROMPTS = ("cache", "tiny", "data.kind=prompts", "data.path=data/p.jsonl", "evaluate.prompts=0", "-o", "out")


@dataclass(frozen=True)
class Target:
    """make(folder) writes what the command needs; `file` of it is mutated. FILE in `argv` stands for `file`."""

    name: str
    make: Callable[[Path], None]
    file: str
    mutations: Sequence[Mutation]
    argv: Sequence[str]
    slow: bool = False  # it loads encoders or trains

    @property
    def keeps(self) -> tuple[str, ...]:
        """What it may leave for the same command to go on with: an unfinished cache, a run, the index of a cache."""
        return {"cache": ("out", "data/.sprint-"), "distill": ("runs", "cache/.sprint-")}.get(
            self.argv[0], ()
        )

    @property
    def command(self) -> list[str]:
        return [self.file if word == "FILE" else word for word in self.argv]


# ---- weights ------------------------------------------------------------------------------------------


def network() -> SanaTransformer2DModel:
    """The built-in teacher's ends with one of its blocks, with random weights."""
    torch.manual_seed(0)
    return SanaTransformer2DModel(**transformer_config("tiny") | {"num_layers": 1})


def safetensors_file(folder: Path) -> None:
    save_file(network().state_dict(), folder / "x.safetensors")


def torch_file(folder: Path) -> None:
    torch.save({"state_dict": network().state_dict(), "epoch": 3}, folder / "x.pth")


def legacy_file(folder: Path) -> None:
    torch.save(network().state_dict(), folder / "x.pth", _use_new_zipfile_serialization=False)


def diffusers_folder(folder: Path) -> None:
    network().save_pretrained(folder / "x")
    (folder / "x" / "trigflow.json").write_text(json.dumps({"time_scale": 1000.0}))


def shards(folder: Path) -> None:
    network().save_pretrained(folder / "x", max_shard_size="600KB")


def model_folder(folder: Path) -> None:
    shutil.copytree(TINY, folder / "model")


# ---- recipes and runs ---------------------------------------------------------------------------------


def recipe(folder: Path) -> None:
    sprint_command(folder, "recipes", "tiny", output="r.yaml")


def finished_run(folder: Path) -> None:
    sprint_command(folder, "distill", "tiny", *RUN)


def evaluated_model(folder: Path) -> None:
    sprint_command(folder, *EVALUATE)


def sprint_command(folder: Path, *argv: str, output: str = "said") -> None:
    """Run in a process of its own; what it prints goes to a file of the folder."""
    import subprocess
    import sys

    with open(folder / output, "w") as file:
        subprocess.run([sys.executable, "-m", "sprint", *argv], cwd=folder, stdout=file, check=True)


# ---- pictures and captions ----------------------------------------------------------------------------


def picture(kind: str, seed: int) -> bytes:
    stream = io.BytesIO()
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 10 + seed).convert("RGB").save(stream, kind)
    return stream.getvalue()


def pictures(folder: Path) -> None:
    (folder / "data").mkdir()
    for i, (kind, suffix) in enumerate((("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("GIF", "gif"))):
        (folder / "data" / f"{i}.{suffix}").write_bytes(picture(kind, i))
        (folder / "data" / f"{i}.txt").write_text(f"picture {i}")


def captions(folder: Path) -> None:
    pictures(folder)
    names = sorted(file.name for file in (folder / "data").iterdir() if file.suffix != ".txt")
    for file in (folder / "data").glob("*.txt"):
        file.unlink()
    lines = (json.dumps({"file_name": name, "text": f"a {name}"}) for name in names)
    (folder / "data" / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def caption_beside(folder: Path) -> None:
    pictures(folder)
    (folder / "data" / "0.txt").unlink()
    (folder / "data" / "0.json").write_text(json.dumps({"caption": "a red circle", "score": 0.5}))


def tar(folder: Path) -> None:
    (folder / "data").mkdir()
    with tarfile.open(folder / "data" / "0.tar", "w") as archive:
        for i in range(3):
            for name, content in ((f"{i}.png", picture("PNG", i)), (f"{i}.json", b'{"caption": "a dot"}')):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def prompts(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "p.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": "two squares"}\n')


def cache(folder: Path) -> None:
    pictures(folder)
    sprint_command(folder, "cache", "tiny", "data.kind=folder", *DATA[2:])
    shutil.move(folder / "out", folder / "cache")


CACHED = ("distill", "tiny", "data.kind=cache", "data.path=cache", *RUN)

TARGETS = (
    Target("weights, safetensors", safetensors_file, "x.safetensors", SAFETENSORS, CONVERT),
    Target("weights, PyTorch", torch_file, "x.pth", TORCH, CONVERT),
    Target("weights, PyTorch's old format", legacy_file, "x.pth", LEGACY, CONVERT),
    Target("a network's config", diffusers_folder, "x/config.json", JSON, ("convert", "x", "-o", "out")),
    Target("trigflow.json", diffusers_folder, "x/trigflow.json", JSON, ("convert", "x", "-o", "out")),
    Target(
        "an index of shards",
        shards,
        "x/diffusion_pytorch_model.safetensors.index.json",
        JSON,
        ("convert", "x", "-o", "out"),
    ),
    Target("model_index.json", model_folder, "model/model_index.json", JSON, SAMPLE, slow=True),
    Target("sprint.json", model_folder, "model/sprint.json", JSON, SAMPLE, slow=True),
    Target("an autoencoder's config", model_folder, "model/vae/config.json", JSON, SAMPLE, slow=True),
    Target(
        "a text encoder's config", model_folder, "model/text_encoder/config.json", JSON, SAMPLE, slow=True
    ),
    Target(
        "a tokenizer's config", model_folder, "model/tokenizer/tokenizer_config.json", JSON, SAMPLE, slow=True
    ),
    Target("a tokenizer", model_folder, "model/tokenizer/tokenizer.json", JSON, SAMPLE, slow=True),
    Target(
        "a scheduler's config", model_folder, "model/scheduler/scheduler_config.json", JSON, SAMPLE, slow=True
    ),
    Target("a recipe", recipe, "r.yaml", TEXT, ("distill", "FILE", "--dry-run")),
    Target("pictures", pictures, "data/1.jpg", BYTES, (*DATA, "data.kind=folder"), slow=True),
    Target("captions as text", pictures, "data/0.txt", TEXT, (*DATA, "data.kind=folder"), slow=True),
    Target("captions as JSON", caption_beside, "data/0.json", JSON, (*DATA, "data.kind=folder"), slow=True),
    Target(
        "captions of a folder", captions, "data/metadata.jsonl", JSON, (*DATA, "data.kind=folder"), slow=True
    ),
    Target("a tar", tar, "data/0.tar", BYTES, (*DATA, "data.kind=webdataset"), slow=True),
    Target(
        "prompts",
        prompts,
        "data/p.jsonl",
        JSON,
        PROMPTS,
        slow=True,
    ),
    Target("a cache's settings", cache, "cache/cache.json", JSON, CACHED, slow=True),
    *(
        Target(f"a run's {file}", finished_run, f"runs/r/{file}", JSON, ("distill", "tiny", *RUN), slow=True)
        for file in (
            "costs.json",
            "metrics.jsonl",
            "recipe.hash",
            "student/sprint.json",
            "student/model_index.json",
        )
    ),
    Target("a result", evaluated_model, "e/result.json", JSON, ("compare", "e", "e")),
    Target("a result, gone on with", evaluated_model, "e/result.json", JSON, EVALUATE, slow=True),
)
