"""SANA-Sprint's own figures (arXiv 2503.09641, Table 2), to stand beside ours.

They were taken on one A100 in bf16 at 1024 px; FID and CLIP score on MJHQ-30K, latency at batch 1, throughput at
batch 10. Only a run of the same size on the same kind of machine can be compared with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sprint.evaluate.metrics.registry import CLIP, FID, GENEVAL, LATENCY
from sprint.evaluate.result import Column, Figure, Measured

SOURCE = "SANA-Sprint, arXiv 2503.09641, Table 2: A100, bf16, 1024 px, MJHQ-30K"
FLUX_SCHNELL = "FLUX-schnell"


@dataclass(frozen=True)
class Published:
    """One row. Latency in seconds, throughput in pictures a second, FID lower is better."""

    model: str
    steps: int
    throughput: float
    latency: float
    fid: float
    clip: float
    geneval: float


PUBLISHED = (
    #         model  steps throughput latency fid  clip  geneval
    Published("0.6b", 1, 7.22, 0.21, 7.04, 28.04, 0.72),
    Published("0.6b", 2, 6.46, 0.25, 6.54, 28.40, 0.76),
    Published("0.6b", 4, 5.34, 0.32, 6.48, 28.45, 0.76),
    Published("1.6b", 1, 6.71, 0.21, 7.69, 28.27, 0.76),
    Published("1.6b", 2, 5.68, 0.24, 6.50, 28.45, 0.77),
    Published("1.6b", 4, 5.20, 0.31, 6.54, 28.45, 0.77),
    Published(FLUX_SCHNELL, 1, 1.58, 0.68, 7.26, 28.49, 0.69),
    Published(FLUX_SCHNELL, 2, 0.92, 1.15, 7.75, 28.25, 0.71),
    Published(FLUX_SCHNELL, 4, 0.50, 2.10, 7.94, 28.14, 0.71),
)


def published(model: str, steps: int) -> Published | None:
    """The row of "0.6b", "1.6b" or `FLUX_SCHNELL` at so many steps; None where the paper has none."""
    return next((row for row in PUBLISHED if (row.model, row.steps) == (model, steps)), None)


def published_size(size: str | None) -> str | None:
    """A student's size as `published` takes it; None for sizes that the paper did not distil."""
    return size if any(row.model == size for row in PUBLISHED) else None


def beside_columns(columns: Sequence[Column], sizes: dict[str, str | None]) -> list[Column]:
    """The paper's columns for ours, with those of its figures that we measured as well.

    sizes   of Sana-Sprint, by model's path
    """
    found = []
    for column in columns:
        size = FLUX_SCHNELL if column.role == FLUX_SCHNELL else sizes.get(column.model)
        if row := published(size or "", column.steps):
            measured = {m: Measured(f) for m, f in _published_figures(row).items() if m in column.measured}
            found.append(Column("published", row.steps, SOURCE, measured=measured, called=row.model))
    return found


def _published_figures(row: Published) -> dict[str, dict[str, Figure]]:
    return {
        FID.name: {"FID": Figure(row.fid, higher=False, spec=".2f")},
        CLIP.name: {"CLIP score": Figure(row.clip, spec=".2f")},
        GENEVAL.name: {"GenEval": Figure(row.geneval, spec=".2f")},
        LATENCY.name: {
            "latency, ms": Figure(1000 * row.latency, higher=False, spec=".0f"),
            "pictures a second": Figure(row.throughput, spec=".2f"),
        },
    }
