"""A folder of captioned pictures, as a person would bring it: `python -m tools.make.pictures OUT --count 50`.

Built-in scenes, each as KEY.png beside KEY.txt: what data.kind=folder reads. The same command gives the same files.
"""

import argparse
from pathlib import Path

from PIL import Image

from sprint.lab.scenes import SIZE, render, scene
from sprint.lab.series import training_seed


def make_pictures(out: Path, count: int, size: int = SIZE, seed: int = 0) -> None:
    """Write the first `count` scenes of the training series that data.seed names, `size` pixels high and wide."""
    out.mkdir(parents=True, exist_ok=True)
    training = training_seed(seed)
    for index in range(count):
        drawn = scene(training, index)
        picture = Image.fromarray(render(drawn.things)).resize((size, size), Image.Resampling.LANCZOS)
        picture.save(out / f"{index:04d}.png")
        (out / f"{index:04d}.txt").write_text(drawn.caption + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.make.pictures", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=50, help="pictures (default: 50)")
    parser.add_argument("--size", type=int, default=SIZE, help=f"pixels, height and width (default: {SIZE})")
    parser.add_argument("--seed", type=int, default=0, help="data.seed of the series (default: 0)")
    args = parser.parse_args()
    make_pictures(args.out, args.count, args.size, args.seed)
    print(f"{args.count} pictures in {args.out}: train on them with data.kind=folder data.path={args.out}")


if __name__ == "__main__":
    main()
