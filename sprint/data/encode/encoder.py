"""Samples into latents and embedded text: pictures through the frozen family, prompts through the teacher too."""

from collections.abc import Callable, Iterator

import torch

from sprint.base.errors import SprintError
from sprint.base.names import resolve
from sprint.data.batch import Batch, Encoded, Item, Sample, Traced
from sprint.data.batching import encode
from sprint.data.encode.draws import TeacherDraws, own_teacher
from sprint.data.encode.traces import TeacherTraces
from sprint.engine.batches import each
from sprint.models.families import load_family
from sprint.recipe.schema import DataKind, Precision, Recipe
from sprint.weights.identity import family_weights, hash_files
from sprint.weights.load import understand_teacher


class Encoder:
    """The recipe's frozen family, and its teacher where there are prompts and no pictures.

    trajectories   whether the teacher's whole way to what a prompt says is kept
    """

    def __init__(self, recipe: Recipe, device: torch.device, trajectories: bool = False):
        self.name, self.teacher = recipe.teacher_family or recipe.teacher, recipe.teacher
        dtype = torch.bfloat16 if recipe.precision is Precision.bf16 else torch.float32
        family = load_family(self.name, recipe.text.max_length, recipe.text.instruction, dtype)
        self.prompted = trajectories or recipe.data.kind is DataKind.prompts
        self.family = family.text_to(device) if self.prompted else family.to(device)
        self._batch_of: Callable[[list[Item]], Batch | Traced] = self._of_pictures
        if self.prompted:
            draws = TeacherTraces if trajectories else TeacherDraws
            self._batch_of = draws(own_teacher(recipe, family), recipe).batch_of

    def _of_pictures(self, samples: list[Sample]) -> Batch:
        return encode(samples, self.family)

    def weights(self) -> dict[str, str]:
        """SHA-256 of everything that encodes, by part."""
        weights = family_weights(self.name)
        if weights is None:
            raise SprintError(f"{self.name}: no weight files of text_encoder and vae there")
        if self.prompted:
            weights["teacher"] = hash_files(understand_teacher(resolve(self.teacher)).source.files)
        return weights

    def __call__(self, items: list[Item]) -> list[Encoded]:
        """On the CPU, in the order of `items`, which may be pictures of several shapes."""
        groups: dict[tuple, list[int]] = {}
        for place, item in enumerate(items):
            groups.setdefault(item.picture.shape if isinstance(item, Sample) else (), []).append(place)
        encoded: dict[int, Encoded] = {}
        for places in groups.values():
            batch = self._batch_of([items[place] for place in places])
            encoded |= zip(places, _separate(batch), strict=True)
        return [encoded[place] for place in range(len(items))]


def _separate(batch: Batch | Traced) -> Iterator[Encoded]:
    batch = each(batch, lambda tensor: tensor.cpu())
    for place, mask in enumerate(batch.mask.bool()):
        one = each(batch, lambda tensor, place=place: tensor[place])
        yield Encoded(one.latent, one.text[mask], one.trajectory if isinstance(one, Traced) else None)
