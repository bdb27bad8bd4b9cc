"""A student opened as a stranger would: by diffusers alone.

    python -m tools.rehearsal.plain STUDENT OUT --size 1024 --max-length 300

Writes OUT/1.png, 2.png and 4.png, one for each number of steps, and OUT/drawn.json with what they took. Nothing of
`sprint` may be imported here, and drawn.json says whether anything was.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import SanaSprintPipeline

STEPS = (1, 2, 4)
PROMPT = "a red circle"


def draw(pipeline: SanaSprintPipeline, steps: int, size: int, max_length: int, bare: bool) -> np.ndarray:
    """The call of the student's model card.  -> uint8 [size, size, 3]"""
    settings = {"complex_human_instruction": None} if bare else {}
    if steps != 2:
        settings["intermediate_timesteps"] = None
    return pipeline(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=4.5,
        height=size,
        width=size,
        use_resolution_binning=False,
        max_sequence_length=max_length,
        generator=[torch.Generator().manual_seed(0)],
        output_type="np",
        **settings,
    ).images[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, required=True, help="pixels a side")
    parser.add_argument("--max-length", type=int, required=True, help="tokens of a prompt")
    parser.add_argument("--bare", action="store_true", help="trained without the instruction before prompts")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.monotonic()
    pipeline = SanaSprintPipeline.from_pretrained(args.student, torch_dtype=getattr(torch, args.dtype)).to(
        device
    )
    record = {"seconds_to_open": round(time.monotonic() - began, 1), "pictures": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    for steps in STEPS:
        began = time.monotonic()
        picture = draw(pipeline, steps, args.size, args.max_length, args.bare)
        finite = bool(np.isfinite(picture).all())
        record["pictures"][str(steps)] = {
            "shape": list(picture.shape),
            "seconds": round(time.monotonic() - began, 1),
            "finite": finite,
        }
        if not finite:
            sys.exit(f"{args.student} at {steps} steps: a picture with values that are not finite")
        pipeline.numpy_to_pil(picture)[0].save(args.out / f"{steps}.png")
    record["sprint_was_imported"] = "sprint" in sys.modules
    record["gpu_memory"] = torch.cuda.max_memory_allocated() if device == "cuda" else None
    (args.out / "drawn.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
