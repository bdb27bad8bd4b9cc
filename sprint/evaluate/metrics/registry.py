"""All metrics, in the order of the table. Their meters are in the files of the same names."""

from sprint.evaluate.metrics.metric import Error, Metric, Usual
from sprint.lab.categories import category_title

GENEVAL_ROW = "GenEval: "  # before a category's name

SCENES = Metric(
    name="scenes",
    title="Scene score",
    about="share of built-in scenes that show what their caption says, read from pixels",
    higher=True,
    unit="share",
    error=Error.standard,
    needs="pip install 'sprint-distill[eval]'",
    reading=(
        "A scene score is the share of prompts whose picture shows what the prompt says. Read it together with FID: "
        "pictures that suit many prompts at once score well, and are far from real ones."
    ),
    below="Under each: what was seen in it, and whether that is what the prompt says.",
    usual=Usual.scenes,
    row=category_title,
)
FID = Metric(
    name="fid",
    title="FID and KID",
    about="distance to real pictures: built-in scenes, or those of --reference",
    higher=False,
    error=Error.spread,
    reading="FID and KID are distances to real pictures: lower is better.",
    needs="for --reference: pip install 'sprint-distill[inception]' and its weights",
)
TEACHER_FID = Metric(
    name="teacher-fid",
    title="FID against the teacher",
    about="distance to the teacher's own pictures of the same prompts",
    higher=False,
    reading="FID against the teacher is a distance to its pictures: lower is nearer, whether or not that is better.",
    usual=Usual.beside_teacher,
)
DIVERSITY = Metric(
    name="diversity",
    title="Diversity over seeds",
    about="distance between pictures of one prompt and several seeds",
    higher=True,
    error=Error.standard,
    needs="CLIP's weights, for other pictures than scenes",
    reading="Diversity over seeds is a distance too: mistakes raise it as variety does, so read it beside FID.",
)
CLIP = Metric(
    name="clip",
    title="CLIP score",
    about="how well pictures match their prompts, 100 times the cosine",
    higher=True,
    spec=".2f",
    error=Error.standard,
    needs="CLIP's weights",
    below="Under each: its score.",
)
GENEVAL = Metric(
    name="geneval",
    title="GenEval",
    about="share of GenEval's 553 prompts whose pictures show what they say",
    higher=True,
    unit="share",
    error=Error.standard,
    needs="evaluation_metadata.jsonl, a Mask2Former and CLIP",
    below="Under each: what is wrong, if anything is.",
    usual=Usual.others,
    row=lambda name: (
        GENEVAL_ROW + category_title(name.removeprefix(GENEVAL_ROW)) if name.startswith(GENEVAL_ROW) else name
    ),
)
PACE = Metric(
    name="pace",
    title="Time of drawing",
    about="what a picture took while these were drawn; `sprint distill` keeps it",
    higher=False,
    unit="ms",
    spec=".1f",
    usual=Usual.none,
)
LATENCY = Metric(
    name="latency",
    title="Latency",
    about="one picture and ten, by turns; no pictures are kept",
    higher=False,
    unit="ms",
    spec=".1f",
    error=Error.spread,
    pictures=False,
)
METRICS = {
    metric.name: metric for metric in (SCENES, FID, TEACHER_FID, DIVERSITY, CLIP, GENEVAL, PACE, LATENCY)
}


def metric_of(name: str) -> Metric:
    """By name; of a name that another version of sprint wrote, a metric of which nothing is known."""
    return METRICS.get(name) or Metric(name, title=name, about="", higher=True)


def described() -> str:
    """A line for each, for the terminal."""
    lines = []
    for metric in METRICS.values():
        better = "higher" if metric.higher else "lower"
        needs = f"; needs {metric.needs}" if metric.needs else ""
        lines.append(f"  {metric.name:12}{metric.about}; {better} is better{needs}")
    return "\n".join(lines)
