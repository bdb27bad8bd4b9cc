"""A student's pictures by sprint and by diffusers' SanaSprintPipeline: the same weights, prompts and noise.

    python -m tools.bench.sampling                                  # CPU: tiny, and a random 20M: about 3 minutes
    python -m tools.bench.sampling --student runs/tiny/student      # a student of your own
    python -m tools.bench.sampling --compile                        # also through torch.compile: minutes more
    python -m tools.bench.sampling --network 0.6b --device cuda --precision bf16 --compile

    tiny    the built-in teacher's weights in a student's network, undistilled, 64 px
    20m     random weights: 12 blocks of width 320, a narrow f32c32 autoencoder, 256 px
    0.6b    random weights of the real shapes: Gemma2 2B, Sana 0.6B, f32c32, 1024 px; nothing is downloaded

1, 2 and 4 steps, one picture and a batch: seconds of text encoder, network, decoder and of the whole call, medians
of interleaved rounds. In fp32 no picture may differ by more than 2 levels of 255; a half precision is first checked
so in fp32, and then its own difference is written down. Writes tools/results/bench_sampling-….json.
"""

import argparse
import copy
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from sprint.base.errors import SprintError
from sprint.base.names import resolve
from sprint.maths.samplers import Noise
from sprint.maths.trigflow import SIGMA_DATA
from sprint.models.encoders import Family
from sprint.models.families import load_family
from sprint.models.sana.encoders import SanaEncoders, human_instruction
from sprint.models.student import from_adapted
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from sprint.recipe.schema import Precision
from sprint.sample.generate import StudentGenerator
from sprint.sample.load import load_generator
from sprint.train.start import with_ones
from sprint.weights.load import load_teacher
from tools.bench.measure import (
    SIZES,
    interleaved,
    ratio,
    summary,
    write_results,
)
from tools.bench.speed import F32C32

STEPS = (1, 2, 4)
GUIDANCE = 4.5
LEVELS = 2  # of 255: how far a picture may be from diffusers'
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
CPU_CASES = ("tiny", "20m")

SCENES = (
    "a red circle",
    "a blue square and a green triangle",
    "two yellow squares",
    "a green ring above a red square",
    "three blue circles",
    "a purple triangle",
    "a red square left of a blue circle",
    "two green circles and a red triangle",
)
SENTENCES = (
    "a fox asleep under a fern, morning light",
    "an old tram climbs a steep street in the rain, its lamps lit, seen from a café window",
    "a bowl of lemons on a blue table cloth, oil on canvas, thick brush strokes, soft shadows",
    "portrait of a fisherman with a grey beard",
    "a small house of glass in a snowy forest at night, warm light inside, stars over the trees, a path of footprints",
    "a paper boat",
    "two children fly a red kite on a wide beach, long shadows, film grain",
    "a street market in summer, baskets of spices, people under striped awnings, a dog asleep in the shade",
)


# ---- the cases --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A student and what stands around it; `weights` says where they come from."""

    network: SanaTransformer2DModel
    family: Family
    size: int
    weights: str
    prompts: tuple[str, ...]

    def copied(self, device: str, dtype: torch.dtype) -> "Case":
        """Weights of its own: what one contender does to them, the other does not see."""
        modules = (self.network, self.family.text_encoder, self.family.autoencoder)
        network, encoder, autoencoder = (copy.deepcopy(m).to(device, dtype) for m in modules)
        family = replace(self.family, text_encoder=encoder, autoencoder=autoencoder)
        return replace(self, network=network, family=family)


def student_case(folder: str) -> Case:
    generator = load_generator(folder)
    if not isinstance(generator, StudentGenerator):
        raise SprintError(f"{folder} is not a student's folder")
    return Case(generator.view.network, generator.family, generator.size, "a distilled student's", SCENES)


def tiny_case() -> Case:
    """The built-in teacher as a student that has learned nothing: QK-norm at ones, guidance without effect."""
    network = from_adapted(with_ones(load_teacher(resolve("tiny"))[0])).eval()
    family = load_family("tiny", max_length=32, instruction=False)
    return Case(network, family, 64, "the built-in teacher's, undistilled", SCENES)


def random_case(name: str) -> Case:
    """20m or 0.6b with random weights and a tokenizer of whole words, so that prompts have real lengths."""
    torch.manual_seed(0)
    if name == "0.6b":
        config, encoder, decoder = SIZES[name].config, gemma2(2304, layers=26, heads=8), F32C32
    else:
        config = SIZES[name].config | {"caption_channels": 256, "sample_size": 8}
        encoder, decoder = gemma2(256, layers=6, heads=4), narrow(F32C32)
    network = SanaTransformer2DModel(**config | {"guidance_embeds": True}).eval()
    autoencoder = AutoencoderDC(**decoder).eval()
    family = SanaEncoders(word_tokenizer(), encoder, autoencoder, max_length=300, instruction=True)
    return Case(network, family, config["sample_size"] * family.downscale, "random", SENTENCES)


def gemma2(width: int, layers: int, heads: int) -> Gemma2Model:
    """Gemma2's proportions (2B: width 2304, 26 layers, 8 heads); the vocabulary is the tokenizer's."""
    config = Gemma2Config(
        vocab_size=len(words()),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=256 if width == 2304 else width // heads,
    )
    return Gemma2Model(config).eval().requires_grad_(False)


def narrow(config: dict) -> dict:
    """The f32c32 autoencoder an eighth as wide, its encoder (not measured) one layer a stage."""
    widths = tuple(width // 8 for width in config["decoder_block_out_channels"])
    ends = {f"{end}_block_out_channels": widths for end in ("encoder", "decoder")}
    return config | ends | {"encoder_layers_per_block": (1,) * 6}


def words() -> list[str]:
    """The vocabulary: every word of the instruction and of the prompts."""
    text = " ".join([*human_instruction(), *SENTENCES])
    pieces = {piece for piece, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)}
    return ["<pad>", "<eos>", "<bos>", "<unk>", *sorted(pieces)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word and mark, behind <bos> as Gemma's."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words())}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


# ---- the contenders ---------------------------------------------------------------------------------


class Ours:
    """sprint: `StudentGenerator`, whole and in its parts."""

    def __init__(self, case: Case, compiled: bool = False):
        view = TrigFlowView(case.network, DENSE_TIME).requires_grad_(False)
        self.generator = StudentGenerator(view, case.family.channels_last(), case.size)
        if compiled:
            self.generator.compile()

    def pictures(self, prompts: list[str], seeds: list[int], steps: int) -> np.ndarray:
        return self.generator.pictures(prompts, seeds, steps, GUIDANCE)

    @torch.inference_mode()
    def text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        return self.generator.family.encode_trimmed(prompts, self.generator.text_unit)

    @torch.inference_mode()
    def latents(self, text: tuple[Tensor, Tensor], seeds: list[int], steps: int) -> Tensor:
        config, family = self.generator.view.network.config, self.generator.family
        cells = self.generator.size // family.downscale
        noise = Noise(seeds, (config.in_channels, cells, cells), family.device)
        scales = torch.full((len(seeds),), GUIDANCE, device=family.device)
        return self.generator.denoise(*text, scales, noise, self.generator.times(steps))

    @torch.inference_mode()
    def decoded(self, latents: Tensor) -> np.ndarray:
        return self.generator.family.decode_latents(latents)


class Theirs:
    """diffusers: `SanaSprintPipeline`, whole and in the parts that its call is made of."""

    def __init__(self, case: Case):
        family = case.family
        self.pipeline = SanaSprintPipeline(
            family.tokenizer,
            family.text_encoder,
            family.autoencoder,
            case.network,
            SCMScheduler(sigma_data=SIGMA_DATA),
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.size = case.size
        self.reading = {"max_sequence_length": family.max_length}
        if not family.instruction:
            self.reading["complex_human_instruction"] = None

    def _call(self, seeds: list[int], steps: int, **settings):
        return self.pipeline(
            num_inference_steps=steps,
            intermediate_timesteps=1.3 if steps == 2 else None,
            guidance_scale=GUIDANCE,
            height=self.size,
            width=self.size,
            use_resolution_binning=False,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **self.reading | settings,
        ).images

    def pictures(self, prompts: list[str], seeds: list[int], steps: int) -> np.ndarray:
        return np.stack([np.array(picture) for picture in self._call(seeds, steps, prompt=prompts)])

    @torch.no_grad()
    def text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        return self.pipeline.encode_prompt(prompts, **self.reading)

    def latents(self, text: tuple[Tensor, Tensor], seeds: list[int], steps: int) -> Tensor:
        embeds = {"prompt_embeds": text[0], "prompt_attention_mask": text[1]}
        return self._call(seeds, steps, output_type="latent", **embeds)

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> list:
        vae = self.pipeline.vae
        pictures = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(pictures, output_type="pil")


Contender = Ours | Theirs


# ---- measuring --------------------------------------------------------------------------------------


def calls(contender: Contender, prompts: list[str], seeds: list[int]) -> dict[str, Callable[[], object]]:
    """What is timed, by part."""
    text = contender.text(prompts)
    latents = contender.latents(text, seeds, 1)
    timed = {"text": lambda: contender.text(prompts), "decoder": lambda: contender.decoded(latents)}
    for n in STEPS:
        timed[f"network, {n}"] = lambda n=n: contender.latents(text, seeds, n)
        timed[f"whole, {n}"] = lambda n=n: contender.pictures(prompts, seeds, n)
    return timed


def differences(ours: Ours, theirs: Theirs, prompts: list[str], seeds: list[int]) -> dict[str, dict]:
    """Levels of 255 between the same pictures, by steps."""
    out = {}
    for n in STEPS:
        a, b = (contender.pictures(prompts, seeds, n).astype(int) for contender in (ours, theirs))
        out[str(n)] = {
            "most": int(abs(a - b).max()),
            "mean": float(abs(a - b).mean()),
            "contrast": float(b.std()),
        }
    return out


def check(found: dict[str, dict]) -> None:
    """Raises SprintError for pictures too far apart, or too plain to tell."""
    for steps, levels in found.items():
        if levels["contrast"] < 1:
            raise SprintError(f"{steps} steps: the pictures are plain; equality would say nothing")
        if levels["most"] > LEVELS:
            raise SprintError(f"{steps} steps: {levels['most']}/255 from diffusers, more than {LEVELS}")


def check_in_fp32(case: Case, device: str) -> dict[str, dict]:
    """One picture's differences with weights in fp32. Convolutions there use TF32 unless told otherwise."""
    ours, theirs = (make(case.copied(device, torch.float32)) for make in (Ours, Theirs))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = differences(ours, theirs, [case.prompts[0]], [0])
    check(found)
    return found


def measure_case(
    case: Case, batches: list[int], device: str, precision: Precision, compiled: bool, rounds: int
) -> dict:
    """Differences and times of all batch sizes."""
    results = {"weights": case.weights, "size": case.size, "precision": precision.value, "batches": {}}
    encoder, decoder = case.family.text_encoder, case.family.autoencoder.decoder
    parameters = {"text": encoder, "network": case.network, "decoder": decoder}
    results["parameters"] = {name: sum(p.numel() for p in m.parameters()) for name, m in parameters.items()}
    if precision is not Precision.fp32:
        results["difference in fp32"] = check_in_fp32(case, device)
    theirs = Theirs(case.copied(device, DTYPES[precision]))
    ours = {"ours": Ours(case.copied(device, DTYPES[precision]))}
    if compiled:
        ours["compiled"] = Ours(case.copied(device, DTYPES[precision]), compiled=True)
    for batch in batches:
        results["batches"][str(batch)] = measure_batch(case, batch, theirs, ours, precision, rounds)
    return results


def measure_batch(
    case: Case, batch: int, theirs: Theirs, ours: dict[str, Ours], precision: Precision, rounds: int
) -> dict:
    """Each part's seconds by contender, and how many times faster than diffusers each of ours is."""
    prompts = [case.prompts[i % len(case.prompts)] for i in range(batch)]
    seeds = list(range(batch))
    found = {name: differences(one, theirs, prompts, seeds) for name, one in ours.items()}
    if precision is Precision.fp32:
        for levels in found.values():
            check(levels)
    by_name = {name: calls(one, prompts, seeds) for name, one in ({"diffusers": theirs} | ours).items()}
    parts = list(by_name["diffusers"])
    gc.freeze()  # collections between calls need not look at all that is loaded
    seconds = interleaved({(part, name): by_name[name][part] for part in parts for name in by_name}, rounds)
    return {
        "text_tokens": {"diffusers": case.family.max_length}
        | {name: one.text(prompts)[0].shape[1] for name, one in ours.items()},
        "difference": found,
        "seconds": {part: {name: summary(seconds[part, name]) for name in by_name} for part in parts},
        "times_faster": {
            part: {name: ratio(seconds[part, "diffusers"], seconds[part, name]) for name in ours}
            for part in parts
        },
    }


# ---- the page ---------------------------------------------------------------------------------------


def page(name: str, case: dict) -> str:
    """Lines for a terminal."""
    lines = [f"{name}: {case['size']} px, {case['precision']}, weights: {case['weights']}"]
    for batch, row in case["batches"].items():
        for who, levels in row["difference"].items():
            most = ", ".join(f"{steps}: {found['most']}" for steps, found in levels.items())
            lines.append(f"  batch {batch}, {who}: levels of 255 from diffusers, by steps: {most}")
        lines.append(
            f"  batch {batch:<4} {'diffusers':>13}"
            + "".join(f"{who:>13}{'':18}" for who in row["difference"])
        )
        for part, seconds in row["seconds"].items():
            line = f"  {part:<10} {1000 * seconds['diffusers']['median']:10.1f} ms"
            for who, faster in row["times_faster"][part].items():
                spread = f"{faster['median']:.2f}x ({faster['min']:.2f}-{faster['max']:.2f})"
                line += f"{1000 * seconds[who]['median']:10.1f} ms {spread:<17}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def make_case(name: str, student: str | None) -> Case:
    if name == "tiny":
        return student_case(student) if student else tiny_case()
    return random_case(name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=SIZES, help="one case only (default: tiny and 20m)")
    parser.add_argument("--student", help="a student's folder in the place of tiny's weights")
    parser.add_argument("--batch", type=int, default=8, help="pictures, beside one alone (default 8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=[p.value for p in DTYPES], default="fp32")
    parser.add_argument("--compile", action="store_true", help="also ours through torch.compile")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    args = parser.parse_args(argv)
    try:
        if args.batch < 1 or args.rounds < 1:
            raise SprintError(f"--batch {args.batch} and --rounds {args.rounds}: both must be at least 1")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise SprintError("--device cuda: there is no CUDA device here")
        results = {}
        for name in [args.network] if args.network else CPU_CASES:
            case, batches = make_case(name, args.student), sorted({1, args.batch})
            results[name] = measure_case(
                case, batches, args.device, Precision(args.precision), args.compile, args.rounds
            )
            print(page(name, results[name]), flush=True)
    except SprintError as error:
        print(f"bench_sampling: {error}", file=sys.stderr)
        return 2
    only = f"-{args.network}" if args.network else ""
    print(write_results(f"bench_sampling{only}-{args.device}", {"cases": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
