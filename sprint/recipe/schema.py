"""A run as data: typed recipes, overrides, and errors that name the nearest valid key.

Every field is explained on the line above it. `recipes/*.yaml` hold only what differs from these defaults.
Steps are counted per stage; in stage 2 a step is one update, of the student, of the heads or of the fake score.
"""

import os
from dataclasses import dataclass, field
from enum import Enum

from sprint.recipe.settings import (
    ABOVE_0,
    DEPTH,
    FINITE,
    GUIDANCE,
    LATER,
    SEED,
    SHARE,
    SHARE_BELOW_1,
    STEPS,
    at_least,
    setting,
)


class DataKind(str, Enum):
    # built-in captioned scenes
    scenes = "scenes"
    # NAME.jpg or another picture with NAME.txt
    folder = "folder"
    # .tar shards of KEY.jpg or another picture with KEY.txt or KEY.json
    webdataset = "webdataset"
    # a dataset of the datasets library, local or on the hub
    huggingface = "huggingface"
    # .tar shards of latents and embedded text, by `sprint cache` or in Sana's own layout
    cache = "cache"
    # one caption a line and no pictures: the teacher draws them
    prompts = "prompts"


class EngineKind(str, Enum):
    # one process
    single = "single"
    # whole networks in every process, gradients averaged (PyTorch's DistributedDataParallel)
    ddp = "ddp"
    # weights, gradients and optimizer state in pieces (PyTorch's fully_shard)
    fsdp2 = "fsdp2"
    # gradients and optimizer state in pieces (DeepSpeed ZeRO-2); AdamW only
    zero2 = "zero2"
    # weights too (DeepSpeed ZeRO-3); AdamW only
    zero3 = "zero3"


class AdaptStart(str, Enum):
    # norm weights from the teacher's own q and k; dense time MLP regressed
    calibrated = "calibrated"
    # the paper's start: norm weights at one, time MLP copied
    ones = "ones"


class OptimizerKind(str, Enum):
    # two betas
    adamw = "adamw"
    # three betas
    came = "came"

    @property
    def betas(self) -> int:
        """How many it takes."""
        return 3 if self is OptimizerKind.came else 2


class Precision(str, Enum):
    fp32 = "fp32"
    # network in bf16 over fp32 weights; maths and time stay fp32
    bf16 = "bf16"


class Products(str, Enum):
    # in the network's own precision
    exact = "exact"
    # of blocks on a CPU: of bf16 factors where that is faster here, by the clock; all else as precision says
    fastest = "fastest"


class NormGroups(str, Enum):
    # real, generated and misaligned samples share batch-norm statistics
    mixed = "mixed"
    # each kind has its own, and the generator's update looks at generated ones alone, as the public trainer
    separate = "separate"


class AdversarialLoss(str, Enum):
    # each logit by itself, as in the paper
    hinge = "hinge"
    # a real logit against the generated one of the same prompt: there is no place where a picture is real enough
    relativistic = "relativistic"


class Renoising(str, Enum):
    # one time and one noise for a real sample and what is compared with it
    shared = "shared"
    # each kind draws its own, as the public trainer
    separate = "separate"


class NullMask(str, Enum):
    # the null prompt's own tokens
    own = "own"
    # as many tokens as the prompt beside it has, as the public trainer
    prompts = "prompts"


@dataclass
class Optimizer:
    # CAME as in the paper; AdamW for small runs
    kind: OptimizerKind = OptimizerKind.came
    # learning rate after the warm-up
    lr: float = setting(2e-6, ABOVE_0)
    # two for AdamW, three for CAME, each in [0, 1)
    betas: tuple[float, ...] = (0.9, 0.999, 0.9999)
    # decoupled
    weight_decay: float = setting(0.0, at_least(0))
    # linear, counted in this optimizer's own updates
    warmup_steps: int = setting(0, at_least(0))
    # last share of its updates over which lr falls linearly to 0
    decay_share: float = setting(0.0, SHARE)
    # on the global gradient norm
    clip_norm: float = setting(0.1, ABOVE_0)


@dataclass
class Data:
    kind: DataKind = DataKind.scenes
    # folder of pictures or shards, dataset name, or file of prompts; scenes take none
    path: str = ""
    # pixels, height and width after resize and centre crop
    size: int = setting(1024, at_least(1))
    # keep the aspect: of Sana's shapes of about size² pixels the nearest
    aspect_buckets: bool = False
    # of the scenes, of the order of samples and of the choice between captions
    seed: int = setting(0, SEED)
    # for kind=huggingface; where neither stands here and there is none of that name: image_path, file, …
    image_column: str = setting("image", kinds=("huggingface",))
    # for kind=huggingface; likewise: prompt, caption, …
    caption_column: str = setting("text", kinds=("huggingface",))
    # of several captions one is drawn with weight exp(score / this); scores are near 30
    caption_temperature: float = setting(1.0, ABOVE_0, kinds=("folder", "webdataset", "huggingface"))
    # of samples tried, how many may be unreadable before the run stops
    bad_share: float = setting(0.01, SHARE, decides=False)
    # threads that read and decode ahead, in every process
    workers: int = setting(1, at_least(1), decides=False)
    # for kind=prompts: how the teacher draws pictures; its trajectories have their own steps and scales, in `distill`
    teacher_steps: int = setting(20, STEPS, kinds=("prompts",))
    # for kind=prompts
    guidance_scale: float = setting(4.5, GUIDANCE, kinds=("prompts",))

    def __post_init__(self):
        self.path = os.path.expanduser(self.path)


@dataclass
class Text:
    # tokens that the network sees
    max_length: int = setting(300, at_least(2))
    # put Sana's "complex human instruction" before each prompt
    instruction: bool = True


@dataclass
class Adapt:
    # 0 skips the training, not the conversion
    steps: int = setting(5000, at_least(0))
    # over all processes
    batch_size: int = setting(1024, at_least(1))
    # where the added norms and the dense time MLP begin
    start: AdaptStart = AdaptStart.calibrated
    # RMSNorm on queries and keys; without it stage 2 is less calm
    qk_norm: bool = True
    # a of σ' = a·σ / (1 + (a − 1)·σ), on logit-normal times
    shift: float = setting(3.0, ABOVE_0)
    # share of samples that see the null prompt
    caption_dropout: float = setting(0.1, SHARE)
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-5))


@dataclass
class TimeDensity:
    """t = atan(exp(N(mean, std²)) / σ_d)."""

    # larger leans towards noise
    mean: float = setting(0.2, FINITE)
    std: float = setting(1.6, ABOVE_0)


@dataclass
class Adversarial:
    # of the LADD term beside sCM; 0 trains without a discriminator
    weight: float = setting(0.5, at_least(0))
    # blocks of the frozen teacher whose outputs feed the heads
    taps: tuple[int, ...] = (2, 8, 14, 19)
    # of the renoising
    time: TimeDensity = field(default_factory=lambda: TimeDensity(-0.6, 1.0))
    # per sample, that generator time becomes π/2
    max_time_probability: float = setting(0.5, SHARE)
    # a neighbour's latent under an unshifted prompt counts as fake
    misaligned_pairs: bool = True
    # samples of a kind that share batch-norm statistics, and swap prompts; divides every micro-batch
    neighbours: int = setting(4, at_least(1))
    # whether kinds of samples share the statistics too
    norm_groups: NormGroups = setting(NormGroups.mixed, later=True)
    # whether kinds of samples share noise and time before the teacher's features are taken
    renoising: Renoising = setting(Renoising.shared, later=True)
    # of the heads, and of the student against them
    loss: AdversarialLoss = setting(AdversarialLoss.hinge, later=True)
    # weight of the heads' penalty (D(x) - D(x + sigma n))² on real samples; 0 is off
    r1: float = setting(0.0, at_least(0), later=True)
    # the same on generated ones
    r2: float = setting(0.0, at_least(0), later=True)
    # of the noise n of both, in units of latents
    sigma: float = setting(0.1, ABOVE_0, later=True)
    # generator updates without the term, while the heads learn already
    warmup_steps: int = setting(0, at_least(0), later=True)
    optimizer: Optimizer = field(default_factory=Optimizer)

    @property
    def penalties(self) -> int:
        """How many kinds of samples the heads see once more with a little noise, for R1 and R2."""
        return (self.r1 > 0) + (self.r2 > 0)

    @property
    def looks(self) -> int:
        """Pictures of a prompt that an update of the heads sees: real, generated, misaligned, those for R1 and R2."""
        return 2 + self.misaligned_pairs + self.penalties


@dataclass
class Consistency:
    # of the sCM term; 0 trains with the others alone
    weight: float = setting(1.0, at_least(0))
    time: TimeDensity = field(default_factory=TimeDensity)
    # r = min(1, generator updates / this)
    tangent_warmup_updates: int = setting(2000, at_least(1))
    # g / (‖g‖ + c); without, one hard sample outweighs a batch
    normalise_tangent: bool = True
    # the constant c
    tangent_normalisation: float = setting(0.1, ABOVE_0)


@dataclass
class Trajectories:
    """Whole ways of the guided teacher from noise to picture, for the prompts of `data`, in place of its pictures."""

    # of each, states that serve as samples of one update, whose batch_size counts states; 0 is off
    states: int = setting(0, at_least(0))
    # of the teacher along each: so many states there are, and their end point
    steps: int = setting(20, STEPS)
    # that pure noise is among the states of a trajectory; where all of its states are used it is
    max_time_probability: float = setting(0.5, SHARE)


@dataclass
class Matching:
    # λ of the distribution-matching term beside the others; 0 trains without a fake score
    weight: float = setting(0.0, at_least(0))
    # most steps of the student's own samples; each update draws how many, all equally likely
    rollout: int = setting(4, STEPS)
    # of where the two scores are compared, and of a rollout's later steps; here tan t = exp(N(0, 1.6²)), as rCM's
    time: TimeDensity = field(default_factory=lambda: TimeDensity(-0.7, 1.6))
    # of the fake score for each update of the student
    updates: int = setting(4, STEPS)
    # 0: the fake score is a network of its own; else so many ranks on top of the frozen teacher
    lora_rank: int = setting(0, at_least(0))
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=4e-7))


@dataclass
class Distill:
    # updates of all that is trained together
    steps: int = setting(20000, at_least(0))
    # over all processes
    batch_size: int = setting(512, at_least(1))
    # blocks of the student; 0: as many as the teacher. More are appended, and start without effect
    depth: int = setting(0, DEPTH, later=True)
    # one is drawn for each sample, all equally likely
    guidance_scales: tuple[float, ...] = (4.0, 4.5, 5.0)
    # which tokens the guided teacher's unconditional branch sees
    null_mask: NullMask = setting(NullMask.own, later=True)
    consistency: Consistency = field(default_factory=Consistency)
    adversarial: Adversarial = field(default_factory=Adversarial)
    # rCM's; not in the paper
    matching: Matching = field(default_factory=Matching, metadata=LATER)
    # weight of the term that straightens paths; not in the paper
    self_consistency: float = setting(0.0, at_least(0))
    trajectories: Trajectories = field(default_factory=Trajectories, metadata=LATER)
    # weight of the term that leads every state of a trajectory to its end
    regression: float = setting(0.0, at_least(0), later=True)
    # lists of times in place of the default ones, as found by `sprint search-steps`
    student_times: tuple[tuple[float, ...], ...] = ()
    # of the student's weights per generator update; 0 is off
    ema_decay: float = setting(0.0, SHARE_BELOW_1)
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass
class Evaluate:
    # pictures to draw with when trained: held-out scenes, which are scored, or so many captions of other data; 0: none
    prompts: int = setting(600, at_least(0))
    # of the student
    steps: tuple[int, ...] = (1, 2, 3, 4)
    teacher_steps: int = setting(20, STEPS)
    guidance_scale: float = setting(4.5, GUIDANCE)
    batch_size: int = setting(50, at_least(1), decides=False)


@dataclass
class Recipe:
    # the run lives in runs/NAME
    name: str = setting("run", decides=False)
    # built-in name ("tiny"), folder, file or hub id
    teacher: str = ""
    # "0.6b", "1.6b" or "4.8b": what --dry-run builds when the teacher is not on disk
    arch: str = setting("", decides=False)
    # where text encoder and autoencoder come from, if not beside the teacher
    teacher_family: str = ""
    # what a person must bring: weights, data, GPUs, hours; printed by --dry-run
    needs: str = setting("", decides=False)
    seed: int = setting(0, SEED)
    precision: Precision = Precision.fp32
    # how blocks multiply on a CPU
    products: Products = setting(Products.exact, later=True)
    # how processes share the work; several are started by torchrun
    engine: EngineKind = setting(EngineKind.single, decides=False)
    # fsdp2: processes that hold one copy of the weights between them; 0 is all of them
    shard_size: int = setting(0, at_least(0), decides=False)
    # the frozen teacher in pieces too, with any engine of several processes
    shard_teacher: bool = setting(False, decides=False)
    # seconds that a process waits for the others before it gives up
    timeout: int = setting(600, at_least(1), decides=False)
    # samples per forward and process, gradients accumulate; 0 takes them all
    micro_batch_size: int = setting(0, at_least(0), decides=False)
    # recompute blocks in the backward pass: less memory, more time
    activation_checkpointing: bool = setting(False, decides=False)
    # transformer blocks through torch.compile; needs a compiler, and its first steps take minutes
    compile: bool = setting(False, decides=False)
    data: Data = field(default_factory=Data)
    text: Text = field(default_factory=Text)
    adapt: Adapt = field(default_factory=Adapt)
    distill: Distill = field(default_factory=Distill)
    evaluate: Evaluate = field(default_factory=Evaluate)
    # steps between checkpoints
    save_every: int = setting(200, at_least(1), decides=False)
    # updates from one line of metrics.jsonl to the next of its kind: of stage 1, student, heads, fake score
    log_every: int = setting(5, at_least(1), decides=False)
    # also log to Weights & Biases (offline unless WANDB_MODE says otherwise)
    wandb: bool = setting(False, decides=False)
