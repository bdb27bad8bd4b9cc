"""`sprint cache`: pictures and captions encoded once, or what a teacher draws."""

import argparse
from pathlib import Path

from sprint.base.errors import SprintError
from sprint.cli.shared import add_recipe, add_verb, at_least_one, numbers, place, quiet_libraries

CACHE = """\
Encode a recipe's pictures and captions once, into shards. Training from them loads neither the text encoder
nor the autoencoder: data.kind=cache data.path=FOLDER. Without pictures the teacher draws what prompts say.
Interrupted, the same command goes on where it stopped: it keeps shards of the right size, and --verify
compares their hashes. Of several captions of a picture one is drawn here, for all epochs. Skipped samples are
left out, so that training meets the others in another order than without a cache.

  sprint cache 0.6b data.path=pictures -o caches/pictures                 then: sprint distill 0.6b data.kind=cache ...
  sprint cache 0.6b --from-prompts data.path=prompts.txt data.seed=1      a prompt a line; the teacher draws
  sprint cache tiny --count 28800 --dtype fp32                            scenes never end: say how many
  sprint cache 0.6b data.path=pictures -o caches/pictures --verify        read back, compare every hash

With --trajectories no picture is read: for each caption the teacher goes from noise to a picture, at a guidance
scale drawn from --guidance, and every state on its way is kept with its velocity. A student learns from them with
distill.trajectories.states=K, K of the states a time, and needs no teacher then. Size: twice the latent for each of
distill.trajectories.steps, 2.6 MB a caption at 20 steps and 1024 pixels.

  sprint cache 0.6b-prompts data.path=prompts.txt --trajectories --guidance 3,4.5        one prompt a line
  sprint cache tiny --count 28800 --trajectories --guidance 1.5,2,3 distill.trajectories.steps=8

Several processes share the work:  torchrun --nproc_per_node 8 -m sprint cache 0.6b data.path=pictures
"""


def add_cache(verbs) -> None:
    verb = add_verb(
        verbs, "cache", "encode pictures and captions once, so that training needs no encoders", CACHE
    )
    add_recipe(verb, example="data.path=pictures")
    verb.add_argument("-o", "--out", type=place, help="folder of the cache (default caches/NAME)")
    verb.add_argument("--count", type=at_least_one, metavar="N", help="only the first N samples")
    verb.add_argument(
        "--shard-size", type=at_least_one, default=1000, metavar="N", help="samples a shard (default 1000)"
    )
    verb.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="of what is stored (default bf16)"
    )
    verb.add_argument(
        "--from-prompts", action="store_true", help="the same as data.kind=prompts: the teacher draws"
    )
    verb.add_argument(
        "--trajectories", action="store_true", help="of captions alone: the teacher's states on its whole way"
    )
    verb.add_argument(
        "--guidance",
        metavar="W,W,…",
        help="with --trajectories: one for each caption (default distill.guidance_scales)",
    )
    verb.add_argument("--verify", action="store_true", help="make nothing: compare every file with its hash")
    verb.set_defaults(verb=cache)


def implied(args: argparse.Namespace) -> list[str]:
    """Overrides that the options stand for. Raises SprintError."""
    overrides = ["data.kind=prompts"] * args.from_prompts
    if args.guidance is not None:
        if not args.trajectories:
            raise SprintError("--guidance belongs to --trajectories; a picture's is data.guidance_scale")
        scales = numbers("--guidance", args.guidance, example="1.5,2,3")
        overrides.append(f"distill.guidance_scales={scales}")
    # all states are kept; a recipe that learns from none could else not be told how many steps make them
    return overrides + ["distill.trajectories.states=1"] * args.trajectories


def cache(args: argparse.Namespace) -> None:
    from sprint.recipe.load import load_recipe

    recipe = load_recipe(args.recipe, [*args.overrides, *implied(args)])
    folder = args.out or Path("caches") / recipe.name
    quiet_libraries()
    from sprint.base.place import check_launcher
    from sprint.data.encode.make import make_cache, verify_cache

    check_launcher()

    if args.verify:
        print(verify_cache(folder))
    else:
        print(make_cache(recipe, folder, args.count, args.shard_size, args.dtype, args.trajectories))
