"""What a family of teachers must tell, so that the rest of the package need not know any of them by name.

A family is a folder here (`sana/`) and a line in `sprint.models.families`. In every folder the same files:

    family       one subclass of `Teacher`, which puts together what the others say
    presets      sizes as rows; the config that a set of tensor shapes describes
    ranges       what a field of its config may be, checked before a module is built
    positions    how its positions follow from the picture size
    keys         names of its weights: the original layout and diffusers'
    blocks       what is where inside of the network, and how it is called at (x, t)
    layout       the order in memory in which it computes
    text_memory  a text's keys and values, computed once for many calls
    encoders     tokenizer, text encoder, autoencoder
    pipelines    the folders that it is exported as, and how to use them
    costs        bytes of activations, for the plan

Its network is a diffusers `ModelMixin`: `config`, `dtype`, `from_config`, `enable_gradient_checkpointing` are as
there. A config is the dict of its constructor's arguments.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sprint.models.encoders import Family
from sprint.recipe.schema import Precision

SPARSE_TIME = 1000.0  # most base teachers embed 1000 · t_fm
DENSE_TIME = 1.0  # Sana-Sprint's embed t_fm itself

Shape = tuple[int, ...]
Row = tuple[str, ...]  # a module's original name, and the one or several in diffusers that are its parts


# ---- a network in numbers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """depth blocks of `width` channels over latents of `channels` and texts `text_width` wide.

    side   latent cells a side of the pictures that it was made for
    patch  latent cells a side of a token
    """

    depth: int
    width: int
    channels: int
    text_width: int
    side: int
    patch: int


@dataclass(frozen=True)
class Footprint:
    """Bytes per channel and image token (`_text`: and text token) of one picture.

    Kept until the backward pass: of a block, of the ends around the blocks, of a head by what it sees. The rest
    is the most that is held on top of what is kept, while a pass of that kind is at work. The score matrix that
    the tangent of the text attention needs is not among it: it is highest only for prompts longer than Sana's.
    """

    block: float  # trained: the student's, or stage 1's
    block_text: float
    ends: float
    ends_text: float
    # of a frozen block: gradients flow through, but not to the weights; the text's keys and values are given
    frozen_block: float
    frozen_ends: float
    head: float
    tangent: float  # value and tangent
    recomputed_tangent: float  # the same where blocks keep nothing
    no_grad: float
    backward: float
    frozen_backward: float  # of a frozen block or a head


# ---- names of weights ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """A list of blocks, `ORIGINAL.i.` and `DIFFUSERS.i.`, and the rows inside of each block."""

    original: str
    diffusers: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class KeyTable:
    """Names of tensors in the original layout and in diffusers'; `sprint.weights.keys` reads it both ways.

    rows     modules outside of the blocks; those whose diffusers names a network lacks do not apply to it
    stacks   the blocks
    extras   tensors of the original that diffusers' class has no place for, with their shapes: numbers, names
             of a field of `Sizes`, or None for any length
    needed   diffusers names without which no config can be told
    """

    rows: Sequence[Row]
    stacks: Sequence[Stack]
    extras: Mapping[str, Sequence[int | str | None]]
    needed: Sequence[str]


# ---- a text read once -----------------------------------------------------------------------------------


class TextMemory(Protocol):
    """Lets a network whose weights do not change meanwhile read each text once."""

    def of(self, text: Tensor, keep: int | None = None) -> AbstractContextManager:
        """Inside, the network reads `text` [B, T, D] or its first rows; `keep` rows of it more than once."""


class NoMemory:
    """Of networks in which what is known of a text depends on (x, t): they read it at every call."""

    def of(self, text: Tensor, keep: int | None = None) -> AbstractContextManager:
        return nullcontext()


# ---- the protocol ---------------------------------------------------------------------------------------


class QK(NamedTuple):
    """A projection to queries or keys and the norm behind it, by the names of module and weight."""

    projection: str
    norm: str
    of_text: bool  # its tokens are the text's, of which some are padding


class Teacher(ABC):
    """One family. Stateless: networks and configs are handed in. All tensors have the batch B first."""

    title: str  # for messages: "Sana"
    network_class: type[ModelMixin]
    keys: KeyTable
    footprints: Mapping[Precision, Footprint]
    presets: Sequence[str]  # names of its sizes
    size_fields: Sequence[str]  # what of a config makes a size
    heads_field: str  # the number of heads, which shapes cannot tell
    student_pipeline_class: str  # `_class_name` of the folders that it is exported as
    teacher_pipeline_class: str
    dense_config: Mapping[
        str, Any
    ]  # what config.json says so that the family's own pipeline keeps dense time

    # ---- a config ---------------------------------------------------------------------------------------

    @abstractmethod
    def preset_config(self, name: str) -> dict:
        """Of a base teacher of the size `name`."""

    @abstractmethod
    def size_of(self, config: Mapping) -> str | None:
        """The preset that it is exactly."""

    @abstractmethod
    def size_name(self, config: Mapping) -> str:
        """For a person: "Sana 0.6B"."""

    @abstractmethod
    def heads_from(self, config: Mapping) -> str:
        """What tells the number of heads where nobody gave it: "the preset of width 1152"."""

    @abstractmethod
    def check_config(self, config: Mapping, where: object) -> dict:
        """The fields of the network's constructor that are in `config`, each held against its range, before anything
        is built. Raises SprintError that names `where` and the first field that is wrong.
        """

    @abstractmethod
    def config_from_shapes(self, shapes: Mapping[str, Shape], given: Mapping, heads: int | None) -> dict:
        """What tensor shapes (diffusers' names) describe, helped by the fields that are `given` in a config.

        heads   as an option or a file tells; else from a preset
        Raises SprintError where a needed tensor is missing or nothing tells.
        """

    @abstractmethod
    def config_of_size(self, sample_size: int) -> dict:
        """What a public teacher's config says for pictures of so many latent cells a side, positions too."""

    def told_by_extras(
        self, given: Mapping, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]
    ) -> tuple[dict, tuple[str, ...]]:
        """What `extras` of the key table tell of the config, and which of them the network computes itself.

        given   fields that a config tells already
        shapes  of all of the source's tensors, under its own names
        read    name -> the tensor
        Raises SprintError where such a tensor is not what the network computes.
        """
        return {}, ()

    @abstractmethod
    def sizes(self, config: Mapping) -> Sizes: ...

    @abstractmethod
    def is_student(self, config: Mapping) -> bool:
        """Whether the network embeds a guidance scale, as students do."""

    @abstractmethod
    def has_qk_norm(self, config: Mapping) -> bool: ...

    @abstractmethod
    def adapted_config(self, config: Mapping) -> dict:
        """Of stage 1's network: with QK-norm."""

    @abstractmethod
    def student_config(self, config: Mapping) -> dict:
        """Of the student of an adapted teacher: with a guidance embedder."""

    @abstractmethod
    def with_depth(self, config: Mapping, depth: int) -> dict: ...

    @abstractmethod
    def meta_network(self, config: Mapping) -> ModelMixin:
        """The real class with no memory behind it."""

    def empty_network(self, config: Mapping) -> ModelMixin:
        """As `meta_network`, with its buffers in memory; `load_state_dict(..., assign=True)` fills it."""
        # of a config's private notes one lists what was a default, and from_config would drop those fields
        fields = {name: value for name, value in config.items() if not name.startswith("_")}
        with init_empty_weights(include_buffers=False):
            return self.network_class.from_config(fields)

    @abstractmethod
    def time_clues(self, config: Mapping, pipeline: str) -> tuple[list[tuple[str, float | None]], str]:
        """What tells a checkpoint's time scale if nobody says it, the nearest first: (its name, scale or None).

        pipeline   `_class_name` of model_index.json, or ""
        -> clues, and why they may all be None
        """

    def forward_flops(self, config: Mapping, side: int, text_tokens: int, blocks: int | None = None) -> int:
        """FLOPs of one forward pass for one picture, as torch counts them over the network on the meta device.

        side     latent cells a side
        blocks   how many of them the pass goes through; all of them without a number
        """
        network, sizes = self.meta_network(config), self.sizes(config)
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            x, t = torch.empty(1, sizes.channels, side, side), torch.empty(1)
            text, mask = torch.empty(1, text_tokens, sizes.text_width), torch.ones(1, text_tokens)
            guidance = t if self.is_student(config) else None
            with nullcontext() if blocks is None else self.only_first(network, blocks):
                self.velocity(network, x, t, text, mask, guidance, DENSE_TIME)
        return counter.get_total_flops()

    # ---- a network --------------------------------------------------------------------------------------

    @abstractmethod
    def velocity(
        self,
        network: ModelMixin,
        x_fm: Tensor,
        t_fm: Tensor,
        text: Tensor,
        mask: Tensor | None,
        guidance: Tensor | None,
        time_scale: float,
    ) -> Tensor:
        """The flow velocity v = noise − data at x_fm = (1 − t_fm)·data + t_fm·noise, whatever the network's own sign
        and clock are.

        x_fm [B, C, H, W] and text [B, T, D] in the network's dtype; t_fm [B] in [0, 1]; mask [B, T], 1 where a
        token is real; guidance [B], the plain scale (4.5, say), for students.  -> [B, C, H, W]
        """

    @abstractmethod
    def blocks(self, network: nn.Module) -> nn.ModuleList:
        """What is sharded, compiled, recomputed and tapped one by one."""

    @abstractmethod
    def output_projections(self, block: nn.Module) -> list[str]:
        """Names within a block of the weights that all it adds to its tokens goes through: where every one of them is
        zero, the block is the identity.
        """

    @abstractmethod
    def only_first(self, network: nn.Module, count: int) -> AbstractContextManager:
        """Inside, the network ends after its first `count` blocks.

        The list of blocks is cut short, rather than the forward left by an exception: FSDP gathers weights before a
        forward and frees them in a hook after it, which has to run.
        """

    def tokens(self, output: Any) -> Tensor:
        """The picture's tokens [B, N, C] in what a block gives; blocks that give a pair override it."""
        return output

    @abstractmethod
    def time_embedder(self, network: nn.Module) -> nn.Module:
        """What stays in float32 where the network is in bf16."""

    @abstractmethod
    def keep_time_in_float32(self, network: nn.Module) -> None:
        """Shield the time embedder from autocast: bf16 has no number from 0.500 to 0.504."""

    @abstractmethod
    def embed_time(self, network: nn.Module, t_fm: Tensor, guidance: Tensor, time_scale: float) -> Tensor:
        """A student's own embedding of (t_fm, guidance), both [B].  -> [B, width]"""

    def text_memory(self, network: nn.Module) -> TextMemory:
        return NoMemory()

    @abstractmethod
    def lay_out(self, network: nn.Module) -> None:
        """Have the network compute in the order in memory that suits it best: same weights, names, hooks and, to
        rounding, values. Before it is compiled or sharded; a family without a better order leaves it as it is.
        """

    # ---- adapted teacher and student --------------------------------------------------------------------

    @abstractmethod
    def qk(self, network: nn.Module) -> list[QK]:
        """Every projection behind which `adapted_config` puts a norm."""

    @abstractmethod
    def time_mlp(self, network: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """The trainable half of a teacher's time embedder, and the fixed one before it: mlp(features(time [B]))."""

    @abstractmethod
    def student_of(self, adapted: ModelMixin) -> ModelMixin:
        """The adapted weights in a network that also embeds guidance; at the start it has no effect."""

    # ---- folders ----------------------------------------------------------------------------------------

    @abstractmethod
    def load_encoders(self, folder: str, max_length: int, instruction: bool, dtype) -> Family:
        """Text side and autoencoder of a pipeline's folder or hub id; nothing that lies there is executed.

        Raises whatever the libraries raise where there is none.
        """

    @abstractmethod
    def downscale(self, autoencoder: Mapping | None) -> int:
        """Pixels per latent cell of an autoencoder's config, or of the usual one."""

    @abstractmethod
    def student_pipeline(self, family: Family, network: ModelMixin) -> DiffusionPipeline:
        """What is saved as a student's folder."""

    @abstractmethod
    def teacher_pipeline(self, family: Family, network: ModelMixin) -> DiffusionPipeline: ...

    @abstractmethod
    def student_usage(self, name: str, size: int, max_length: int, instruction: bool, prompt: str) -> str:
        """Markdown for a student's card: how to draw with the folder `name` without sprint."""

    def times_usage(self, times: Sequence[float]) -> str:
        """Markdown behind it: the same at a student's own TrigFlow times; nothing where only sprint can."""
        return ""

    @abstractmethod
    def teacher_usage(self) -> str:
        """A sentence for a teacher's card: what opens it."""
