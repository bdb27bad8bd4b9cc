"""A run as data: typed recipes, overrides, and errors that name the nearest valid key.

Every field is explained where it is defined. `recipes/*.yaml` hold only what differs from these defaults.
Steps are counted per stage; in stage 2 a step is one update, of the generator or of the discriminator.
"""

from dataclasses import dataclass, field
from enum import Enum


class DataKind(str, Enum):
    scenes = "scenes"  # built-in captioned scenes
    folder = "folder"  # NAME.{jpg,png,webp} with NAME.txt
    webdataset = "webdataset"  # .tar shards of KEY.jpg, .png or .webp with KEY.json or KEY.txt
    huggingface = "huggingface"  # a dataset of the datasets library, local or on the hub
    cache = "cache"  # .tar shards of latents and embedded text, by `sprint cache` or in Sana's own layout
    prompts = "prompts"  # one caption a line and no pictures: the teacher draws them


class EngineKind(str, Enum):
    single = "single"  # one process
    ddp = "ddp"  # whole networks in every process, gradients averaged (PyTorch's DistributedDataParallel)
    fsdp2 = "fsdp2"  # weights, gradients and optimizer state in pieces (PyTorch's fully_shard)
    zero2 = "zero2"  # gradients and optimizer state in pieces (DeepSpeed ZeRO-2); AdamW only
    zero3 = "zero3"  # weights too (DeepSpeed ZeRO-3); AdamW only


class AdaptStart(str, Enum):
    calibrated = "calibrated"  # norm weights from the teacher's own q and k; dense time MLP regressed
    ones = "ones"  # the paper's start: norm weights at one, time MLP copied


class OptimizerKind(str, Enum):
    adamw = "adamw"
    came = "came"


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # network in bf16 over fp32 weights; maths and time stay fp32


@dataclass
class Optimizer:
    kind: OptimizerKind = OptimizerKind.came  # of the paper; AdamW for small runs
    lr: float = 2e-6  # after the warm-up
    betas: tuple[float, ...] = (0.9, 0.999, 0.9999)  # two for AdamW, three for CAME
    weight_decay: float = 0.0  # decoupled
    warmup_steps: int = 0  # linear, counted in this optimizer's own updates
    decay_share: float = 0.0  # last share of its updates over which lr falls linearly to 0
    clip_norm: float = 0.1  # on the global gradient norm


@dataclass
class Data:
    kind: DataKind = DataKind.scenes
    path: str = ""  # folder of pictures or shards, dataset name, or file of prompts; scenes need none
    size: int = 1024  # pixels, height and width after resize and centre crop
    aspect_buckets: bool = False  # keep the aspect: of Sana's shapes of about size² pixels the nearest
    seed: int = 0  # of the scenes, of the order of samples and of the choice between captions
    image_column: str = "image"  # for kind=huggingface
    caption_column: str = "text"  # for kind=huggingface
    caption_temperature: float = (
        1.0  # of several captions one is drawn with weight exp(score / this); scores near 30
    )
    bad_share: float = 0.01  # of samples tried, how many may be unreadable before the run stops
    workers: int = 1  # threads that read and decode ahead, in every process
    teacher_steps: int = 20  # for kind=prompts: how the teacher draws
    guidance_scale: float = 4.5  # for kind=prompts


@dataclass
class Text:
    max_length: int = 300  # tokens that the network sees
    instruction: bool = True  # put Sana's "complex human instruction" before each prompt


@dataclass
class Adapt:
    steps: int = 5000  # 0 skips the training, not the conversion
    batch_size: int = 1024  # over all processes
    start: AdaptStart = AdaptStart.calibrated
    qk_norm: bool = True  # RMSNorm on queries and keys; without it stage 2 is less calm
    shift: float = 3.0  # σ' = a·σ / (1 + (a − 1)·σ) on logit-normal times
    caption_dropout: float = 0.1  # share of samples that see the null prompt
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-5))


@dataclass
class TimeDensity:
    """t = atan(exp(N(mean, std²)) / σ_d)."""

    mean: float = 0.2  # larger leans towards noise
    std: float = 1.6


@dataclass
class Adversarial:
    weight: float = 0.5  # of the LADD term beside sCM; 0 trains without a discriminator
    taps: tuple[int, ...] = (2, 8, 14, 19)  # blocks of the frozen teacher whose outputs feed the heads
    time: TimeDensity = field(default_factory=lambda: TimeDensity(-0.6, 1.0))  # of the renoising
    max_time_probability: float = 0.5  # per sample, generator time becomes π/2
    misaligned_pairs: bool = True  # a neighbour's latent under an unshifted prompt counts as fake
    neighbours: int = (
        4  # samples that share batch-norm statistics and swap prompts; divides every micro-batch
    )
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass
class Consistency:
    weight: float = 1.0  # of the sCM term; 0 trains with LADD alone
    time: TimeDensity = field(default_factory=TimeDensity)
    tangent_warmup_updates: int = 2000  # r = min(1, generator updates / this)
    normalise_tangent: bool = True  # g / (‖g‖ + c); without, one hard sample outweighs a batch
    tangent_normalisation: float = 0.1  # the constant c


@dataclass
class Distill:
    steps: int = 20000  # updates of generator and discriminator together
    batch_size: int = 512  # over all processes
    guidance_scales: tuple[float, ...] = (4.0, 4.5, 5.0)  # drawn uniformly per sample
    consistency: Consistency = field(default_factory=Consistency)
    adversarial: Adversarial = field(default_factory=Adversarial)
    self_consistency: float = 0.0  # weight of the term that straightens paths; not in the paper
    student_times: tuple[
        tuple[float, ...], ...
    ] = ()  # in place of default lists, as found by `sprint search-steps`
    ema_decay: float = 0.0  # of the student's weights per generator update; 0 is off
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass
class Evaluate:
    prompts: int = 600  # held-out scenes for scores and FID; 0 skips both
    steps: tuple[int, ...] = (1, 2, 3, 4)  # of the student
    teacher_steps: int = 20
    guidance_scale: float = 4.5
    batch_size: int = 50


@dataclass
class Recipe:
    name: str = "run"  # the run lives in runs/NAME
    teacher: str = ""  # built-in name ("tiny"), folder, file or hub id
    arch: str = ""  # "0.6b", "1.6b" or "4.8b": what --dry-run builds when the teacher is not on disk
    teacher_family: str = ""  # where text encoder and autoencoder come from, if not beside the teacher
    needs: str = ""  # what a person must bring: weights, data, GPUs, hours; printed by --dry-run
    seed: int = 0
    precision: Precision = Precision.fp32
    engine: EngineKind = EngineKind.single  # how processes share the work; several are started by torchrun
    shard_size: int = 0  # fsdp2: processes that hold one copy of the weights between them; 0 is all of them
    shard_teacher: bool = False  # the frozen teacher in pieces too, with any engine of several processes
    timeout: int = 600  # seconds that a process waits for the others before it gives up
    micro_batch_size: int = 0  # samples per forward and process, gradients accumulate; 0 takes them all
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, more time
    compile: bool = (
        False  # transformer blocks through torch.compile; needs a compiler, and its first steps minutes
    )
    data: Data = field(default_factory=Data)
    text: Text = field(default_factory=Text)
    adapt: Adapt = field(default_factory=Adapt)
    distill: Distill = field(default_factory=Distill)
    evaluate: Evaluate = field(default_factory=Evaluate)
    save_every: int = 200  # steps between checkpoints
    log_every: int = 5  # steps between lines of metrics.jsonl
    wandb: bool = False  # also log to Weights & Biases (offline unless WANDB_MODE says otherwise)
