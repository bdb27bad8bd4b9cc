"""What stands beside a picture: one caption, or several with scores to choose by."""

from collections.abc import Mapping, Sequence

import numpy as np

from sprint.base.door import shown
from sprint.data.items import BadSample, said

# Names of a JSON object's fields, or of a table's columns, that hold captions. The first that is there and not empty
# is meant; capitals do not count.
FIELDS = ("captions", "prompt", "caption", "text", "prompts", "texts", "description")
SCORES = "clip_scores"
ABSURD = 1e9  # as a clip score
LONGEST = 100_000  # characters; a tokenizer takes minutes over millions, and keeps a few hundred tokens


def caption_from(value: object, where: str, temperature: float, draw: np.random.Generator) -> str:
    """The caption that a text, a list of texts or a JSON object holds; of several one is drawn.

    value   "…" or ["…", …] or {"captions": ["…", …], "clip_scores": [31.2, …]} (scores may be left out)
            or {"prompt": "…"}, or another of FIELDS

    -> without blanks around it.  Raises `BadSample` (`where` names it) if there is none to be had.
    """
    scores, there = None, ""
    if isinstance(value, Mapping):
        field = field_of(value)
        names = ", ".join(map(shown, list(value)[:6])) or "nothing"
        there = f"{field} is null" if field else f"has {names}; expected one of {', '.join(FIELDS)}"
        scores = value.get(SCORES) if field == "captions" else None
        value = value.get(field)
    captions = [value] if isinstance(value, str) else value
    if captions is None:
        raise BadSample("missing caption", where, there)
    if not _are(captions, str):
        raise BadSample("unreadable caption", where, "neither text nor a list of texts")
    if scores is not None and not (_are(scores, (int, float)) and len(scores) == len(captions)):
        raise BadSample("unreadable caption", where, "clip_scores must be one number for each caption")
    if scores is not None and not all(abs(score) < ABSURD for score in scores):  # nor is NaN
        raise BadSample("unreadable caption", where, "clip_scores hold a number that is no score")
    kept = [k for k, caption in enumerate(captions) if caption.strip()]
    if not kept:
        raise BadSample("empty caption", where)
    scores = scores and [scores[k] for k in kept]
    return choose_caption([checked(captions[k], where) for k in kept], scores, temperature, draw)


def field_of(names: Mapping | Sequence[str]) -> str | None:
    """The name of the field that holds the caption, as it is written there. Of an object an empty one only if all are.

    names   an object, or the names of columns
    """
    written = {name.lower(): name for name in names if isinstance(name, str)}
    found = [written[field] for field in FIELDS if field in written]
    if isinstance(names, Mapping):
        found.sort(key=lambda field: names[field] in ("", [], None))  # stable
    return found[0] if found else None


def checked(caption: str, where: str) -> str:
    """Without blanks around it. Raises `BadSample` for a caption that no tokenizer could take."""
    caption = caption.strip()
    if not caption:
        raise BadSample("empty caption", where)
    if len(caption) > LONGEST:
        raise BadSample("unreadable caption", where, f"{len(caption)} characters, of at most {LONGEST}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can hold
        raise BadSample("unreadable caption", where, said(error)) from error
    return caption


def choose_caption(
    captions: Sequence[str], scores: Sequence[float] | None, temperature: float, draw: np.random.Generator
) -> str:
    """Caption i with probability exp(score_i / temperature) / Σ; without scores each alike.

    (Sana, arXiv 2410.10629, §3.1: "CLIP-Score-based caption sampler")
    """
    scores = np.zeros(len(captions)) if scores is None else np.asarray(scores, float)
    weights = np.exp((scores - scores.max()) / temperature)
    return captions[draw.choice(len(captions), p=weights / weights.sum())]


def _are(values: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values)
