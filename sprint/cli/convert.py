"""`sprint convert`: a teacher's weights in another layout, proved."""

import argparse

from sprint.cli.shared import add_verb, quiet_libraries

CONVERT = """\
Convert between original and diffusers naming and certify the result: every tensor bit for bit, and the
flow velocity recovered from the TrigFlow view. A failed certificate leaves nothing behind.

  sprint convert teacher.safetensors                               writes the folder teacher-trigflow
  sprint convert teacher.pth -o teacher --verify full              the whole network in fp64, both ways back
  sprint convert teacher --to original -o teacher.safetensors      back to Sana's own names
  sprint convert runs/tiny/student --to original -o student.safetensors
  sprint convert epoch_1_step_2000.pth --weights state_dict_ema    the averaged weights of a training run
"""


def add_convert(verbs) -> None:
    verb = add_verb(
        verbs, "convert", "a flow-matching teacher in TrigFlow form, proved lossless; and back", CONVERT
    )
    verb.add_argument(
        "source", help=".safetensors, .pth, a folder (of a run, diffusers', sharded, converted) or a hub id"
    )
    verb.add_argument("-o", "--out", help="output folder, or a .safetensors/.pth file with --to original")
    verb.add_argument("--to", choices=("trigflow", "flow", "original"), default="trigflow")
    verb.add_argument("--verify", choices=("fast", "full", "off"), default="fast")
    verb.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="round the weights to this")
    verb.add_argument(
        "--time-scale", choices=("sparse", "dense"), help="what the teacher embeds: 1000·t or t itself"
    )
    verb.add_argument("--cross-attention-heads", type=int, help="where neither config nor width tells")
    verb.add_argument("--sample-size", type=int, help="latent cells a side, where nothing tells: 64 for 2K")
    verb.add_argument(
        "--weights", metavar="KEY", help="which of a file's networks: state_dict_ema, model.ema, …"
    )
    verb.add_argument(
        "--variant", metavar="NAME", help="which of a folder's files: bf16 for model.bf16.safetensors"
    )
    verb.set_defaults(verb=convert)


def convert(args: argparse.Namespace) -> None:
    quiet_libraries()
    from sprint.base.names import resolve
    from sprint.weights.checkpoint import TIMES
    from sprint.weights.convert import convert as run
    from sprint.weights.convert import describe

    result = run(
        resolve(args.source),
        args.out,
        to=args.to,
        verify=args.verify,
        dtype=args.dtype,
        time_scale=TIMES.get(args.time_scale),
        cross_attention_heads=args.cross_attention_heads,
        sample_size=args.sample_size,
        weights=args.weights,
        variant=args.variant,
    )
    print(describe(result))
