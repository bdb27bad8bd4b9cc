"""What stages share: an update made of parts, and what a checkpoint holds of a stage."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from torch import Tensor, nn

from sprint.base.clock import Clock
from sprint.data.batch import Batch, parts
from sprint.engine.batches import take, to_device
from sprint.engine.engine import Engine
from sprint.engine.held import Read, Tensors
from sprint.recipe.schema import Adapt, Distill, Recipe
from sprint.train.update import Means, Updater, prefixed, under

Drawn = TypeVar("Drawn", bound=tuple)
Module = TypeVar("Module", bound=nn.Module)
Term = Callable[..., tuple[Tensor, dict[str, Tensor]]]  # (*prepared, draws) -> loss, what to log


@contextmanager
def as_it_is(batch: Batch, first: bool) -> Iterator[tuple[Batch]]:
    """Prepares nothing."""
    yield (batch,)


class Stage:
    """One training method at work; steps count from 0.

    A method's own file has its terms and a subclass that says `name`, `phase`, `update`, `updaters` and `result`.
    """

    name: str
    clock: Clock  # `update` marks its parts on it

    def __init__(self, recipe: Recipe, engine: Engine, settings: Adapt | Distill):
        self.recipe, self.engine, self.settings = recipe, engine, settings
        self.clock = Clock(engine.device)

    @property
    def steps(self) -> int:
        return self.settings.steps

    @property
    def batch_size(self) -> int:
        """Over all processes."""
        return self.settings.batch_size

    @property
    def traced(self) -> bool:
        """Whether what it reads are whole trajectories of the teacher."""
        return False

    @property
    def reads(self) -> int:
        """Samples of the data that a batch is made of, over all processes."""
        return self.batch_size

    @property
    def kinds(self) -> int:
        """Of updates that take turns, step by step."""
        return 1

    def phase(self, step: int) -> str:
        """What the log calls this step."""
        raise NotImplementedError

    def update(self, step: int, batch: Batch) -> Means:
        """One optimizer step on this process's share of batch number `step`."""
        raise NotImplementedError

    def updaters(self) -> dict[str, Updater]:
        """By the name under which a checkpoint has them; "" for the only one of a stage."""
        raise NotImplementedError

    # ---- an update --------------------------------------------------------------------------------------

    def my_share(self, draws: Drawn) -> Drawn:
        """Of the whole batch's draws those for this process's samples, on its device."""
        return to_device(take(draws, self.engine.share(self.batch_size)), self.engine.device)

    def descend(
        self,
        updater: Updater,
        terms: Sequence[Term],
        batch: Batch,
        draws: tuple,
        prepared: Callable[[Batch, bool], AbstractContextManager[tuple]] = as_it_is,
    ) -> tuple[Means, Tensor]:
        """Add up the gradients of all terms over all parts of the batch, then make the optimizer's step.

        Every term of a part runs backward before the next is built, so that one graph is there at a time.

        batch, draws   this process's share
        prepared       around a part (and whether it is the first): gives what its terms take before their draws

        -> what to log, whether the weights moved and are finite (a scalar on the device)
        """
        trained, means, size = updater.trained, Means(), len(batch.latent)
        trained.zero_grad()
        for part in parts(size, self.recipe.micro_batch_size):
            share = (part.stop - part.start) / size
            with prepared(take(batch, part), part.start == 0) as given:
                for term in terms:
                    more = part.stop < size or term is not terms[-1]
                    with trained.accumulating(more):
                        with self.engine.autocast():
                            loss, seen = term(*given, take(draws, part))
                        with self.clock.part("backward"):
                            trained.backward(share * loss)
                    means.add(share, loss=loss, **seen)
        with self.clock.part("optimizer"):
            norm, moved = updater.step()
        means.note_update(norm, updater)
        return means, moved

    def drop_gradients(self) -> None:
        """Between two updates nobody reads them; the next makes its own."""
        for updater in self.updaters().values():
            updater.trained.zero_grad()

    # ---- what comes of it -------------------------------------------------------------------------------

    def rebuilt(
        self, updater: Updater, held: Mapping[str, Tensor], empty: Callable[[], Module]
    ) -> Module | None:
        """The trained module made anew on the CPU of the main process, from weights as the engine holds them.

        Collective.  -> in eval mode; None on the other processes
        """
        weights = updater.trained.full(held)
        if not self.engine.main_process:
            return None
        module = empty()
        module.load_state_dict(weights, assign=True)
        return module.eval()

    def tensors(self) -> Tensors:
        """What a checkpoint holds. Collective."""
        tensors: Tensors = {}
        for name, updater in self.updaters().items():
            tensors |= prefixed(name, updater.tensors())
        return tensors

    def facts(self) -> dict:
        """And what of it is no tensor."""
        facts = {name: updater.facts() for name, updater in self.updaters().items()}
        return facts.pop("", {}) | facts

    def load(self, read: Read, facts: dict) -> None:
        """Go on from a checkpoint. Collective."""
        for name, updater in self.updaters().items():
            updater.load(under(name, read), facts[name] if name else facts)

    def check(self) -> None:
        """Before its weights are saved. Raises Diverged where they are not finite. Collective."""
        for updater in self.updaters().values():
            updater.check()

    def check_moved(self) -> None:
        """After the last step. Raises Diverged where there were updates and none was taken."""
        for updater in self.updaters().values():
            updater.check_moved()

    def close(self) -> None:
        """Let go of what would outlive the stage."""
        for updater in self.updaters().values():
            updater.trained.close()
