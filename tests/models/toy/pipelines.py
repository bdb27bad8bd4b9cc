"""The toy's folders: written by hand, part by part."""

import json
from pathlib import Path

from sprint.models.encoders import Family
from sprint.models.teacher import DENSE_TIME, SPARSE_TIME
from tests.models.toy.blocks import ToyTransformer

STUDENT, TEACHER = "ToyFewStepFolder", "ToyFolder"
DENSE_CONFIG = {"clock_scale": DENSE_TIME / SPARSE_TIME}


class ToyFolder:
    def __init__(self, kind: str, family: Family, network: ToyTransformer):
        self.kind, self.family, self.network = kind, family, network

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": self.kind}))
        self.family.tokenizer.save_pretrained(folder / "tokenizer")
        self.family.text_encoder.save_pretrained(folder / "text_encoder")
        self.family.autoencoder.save_pretrained(folder / "vae")
        self.network.save_pretrained(folder / "transformer")


def student_pipeline(family: Family, network: ToyTransformer) -> ToyFolder:
    return ToyFolder(STUDENT, family, network)


def teacher_pipeline(family: Family, network: ToyTransformer) -> ToyFolder:
    return ToyFolder(TEACHER, family, network)


def student_usage(name: str, size: int, max_length: int, instruction: bool, prompt: str) -> str:
    return "Nothing but sprint draws with it.\n"


def teacher_usage() -> str:
    return "Opens in sprint."
