"""How long the list will take, told before it begins."""

from collections.abc import Mapping
from pathlib import Path

from sprint.base.door import read_json
from sprint.pages.html import duration
from tools.ablations.jobs import RESULT, Job, is_done

# Seconds of a thread of an AMD EPYC, from tools/results/ablations.json: 360 updates took a student alone 121 s and 180
# of them 65 s, so 900 pictures of 1, 2 and 4 steps took 10; a base run had 178 s more for its 11,520 samples. What has
# run here corrects both.
A_SAMPLE, A_PICTURE = 178 / 11_520, 10 / 900


def expected(job: Job) -> float:
    """Seconds of a thread, training and scoring: by samples and pictures alone, whatever the method."""
    recipe = job.recipe
    adapt, distill = (stage.steps * stage.batch_size for stage in (recipe.adapt, recipe.distill))
    samples = {"teacher": adapt, "student": distill, "sparse": adapt + distill}[job.kind]
    drawn = 1 if job.kind == "teacher" else len(recipe.evaluate.steps) + len(job.points)
    return A_SAMPLE * samples + A_PICTURE * drawn * recipe.evaluate.prompts


def estimate(jobs: Mapping[str, Job], root: Path, at_once: int) -> str:
    """One line: runs, and what is left of them in time, by the pace of those that are done."""
    done = [job for job in jobs.values() if is_done(job, root)]
    left = sum(expected(job) for key, job in jobs.items() if job not in done)
    took = sum(read_json(root / job.key / RESULT).get("seconds", 0.0) for job in done)
    pace = took / sum(map(expected, done)) if took else 1.0
    by = (
        f"the pace of {len(done)} runs here"
        if took
        else "an AMD EPYC's pace: the next start knows this machine's"
    )
    threads = f"{duration(pace * left)} of a thread"
    alone = f", {duration(pace * left / at_once)} with {at_once} at once" if at_once > 1 else ""
    return f"{len(jobs)} runs, {len(done)} done; about {threads} left{alone}, by {by}"
