"""What an evaluation knows while it goes on, and how it is written down: result.json and its page."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

from sprint.base.environment import environment
from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.choices import Options
from sprint.evaluate.earlier import measured_before, with_earlier
from sprint.evaluate.metrics.latency import first_line
from sprint.evaluate.metrics.metric import Meter
from sprint.evaluate.metrics.registry import METRICS
from sprint.evaluate.models import Model, evaluation_name
from sprint.evaluate.page import write_page
from sprint.evaluate.prompts import Prompts
from sprint.evaluate.published import SOURCE, beside_columns
from sprint.evaluate.result import Column, Measured, Result, write_result

log = logging.getLogger(__name__)
SKIPPED = "%s is left out: %s"


@dataclass
class Evaluation:
    """What is known before anything is drawn; `left_out` and `protocols`, by metric, grow.

    timed     whether latency is measured when all else is written
    prompts   to draw for metrics that have none of their own, or why there are none
    wanted    what each metric looks at; `sets`: the same by name, since several may look at one
    recipe    YAML of the training run, if it is known;  earlier: an evaluation in the same folder
    drew      whether any picture is new since that one
    """

    options: Options
    models: Sequence[Model]
    meters: Sequence[Meter]
    timed: bool
    prompts: Prompts | NotHereError
    wanted: Mapping[str, Prompts]
    left_out: dict[str, str]
    recipe: str = ""
    earlier: Result | None = None
    drew: bool = False
    protocols: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def sets(self) -> dict[str, Prompts]:
        return {prompts.name: prompts for prompts in self.wanted.values()}

    def leave_out(self, name: str, error: Exception) -> None:
        self.left_out[name] = first_line(error)
        log.warning(SKIPPED, name, self.left_out[name])

    def measured_before(self, meter: Meter, columns: Sequence[Column]) -> list[Measured] | None:
        """What the earlier evaluation says of every column, if the meter would say the same again."""
        if not self.earlier or self.drew:
            return None
        name, new = meter.metric.name, self._result(columns)
        return measured_before(name, meter.protocol(), self.wanted[name].name, new, self.earlier)

    def write(self, columns: Sequence[Column], last: bool = True) -> Result:
        """Write result and page, with what an earlier evaluation had besides.

        last   whether this is all: then it is said what of the earlier one is dropped

        Raises SprintError where nothing was measured.
        """
        if not self.protocols:
            raise SprintError("nothing could be measured: " + "; ".join(self.left_out.values()))
        options, result = self.options, self._result(columns)
        if self.earlier:
            result, dropped = with_earlier(result, self.earlier)
            for line in dropped if last else ():
                log.warning("earlier figures in %s are dropped: %s", options.out, line)
        protocols = {name: result.protocols[name] for name in METRICS if name in result.protocols}
        beside = beside_columns(result.columns, {model.path: model.paper for model in self.models})
        source = f"published: {SOURCE}" if beside else ""
        result = replace(result, protocols=protocols, published=beside, source=source)
        write_result(options.out, result)
        write_page(options.out, result)
        return result

    def _result(self, columns: Sequence[Column]) -> Result:
        options = self.options
        return Result(
            name=evaluation_name(options.model),
            columns=columns,
            sets={name: found.shots for name, found in self.sets.items()},
            used={name: prompts.name for name, prompts in self.wanted.items() if name in self.protocols},
            protocols=dict(self.protocols),
            left_out=dict(self.left_out),
            settings=_settings(options, columns),
            environment=environment(options.choices.device),
            recipe=self.recipe,
            command=options.command,
            made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


def _settings(options: Options, columns: Sequence[Column]) -> dict[str, str]:
    drawn = [column for column in columns if column.hash]
    return {
        "seeds": f"from {options.choices.seed} on, one a picture",
        "guidance": f"{options.guidance:g}",
        "dtype": _shared_or_listed(drawn, lambda column: column.dtype),
        "picture size": _shared_or_listed(drawn, lambda column: f"{column.size} px"),
        "device": options.choices.device,
        "batch size": _shared_or_listed(drawn, lambda column: str(column.batch)),
    }


def _shared_or_listed(columns: Sequence[Column], fact: Callable[[Column], str]) -> str:
    """A fact of all columns once, or of each."""
    facts = {column.title: fact(column) for column in columns}
    values = set(facts.values())
    if len(values) == 1:
        return values.pop()
    return "; ".join(f"{title}: {told}" for title, told in facts.items())
