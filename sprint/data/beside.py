"""Where the captions of a picture are: one answer for folders and for tars.

Beside the picture KEY.jpg they are, the first that is there:

KEY.txt, KEY.caption   the caption
KEY.json               an object with one of `captions.FIELDS`, a list of texts or a text

and more of them, as Sana has them, of the same picture:

KEY_ANY.json                {KEY: {NAME: caption}}; NAME "prompt" stands for _ANY
KEY_ANY_clip_score.json     {KEY: {NAME: score}}; NAME is one of those, a text in KEY.json, or "prompt" for the
                            caption of KEY.txt, KEY.caption or KEY.json
SHARD_ANY.json, SHARD_ANY_clip_score.json   the same, of all KEYs of SHARD.tar

Of captions with scores one is drawn by its score, those without stand back; without any score all are alike. Scores are
used as they stand, and data.caption_temperature is in their units: Sana writes 100 times the cosine.
"""

from collections.abc import Container, Mapping

import numpy as np

from sprint.base.door import decode, parse_json
from sprint.base.errors import SprintError
from sprint.data.captions import SCORES, caption_from, field_of
from sprint.data.items import BadSample

TEXTS, OBJECT = ("txt", "caption"), "json"  # suffixes, in the order in which they are asked
OWN = (*TEXTS, OBJECT)
SCORE_FILES = "_clip_score.json"


def owner_of(name: str, owners: Container[str]) -> str | None:
    """KEY of KEY_ANY_MORE: of `owners` the longest that begins it, as far as a "_"; None where there is none."""
    while name not in owners:
        name, bar, rest = name.rpartition("_")
        if not bar or "/" in rest:
            return None
    return name


def caption_beside(
    content: Mapping[str, bytes], key: str, where: str, temperature: float, draw: np.random.Generator
) -> str:
    """The caption of a picture, drawn where there are several.

    content   what is beside it, by suffix: "txt", "caption", "json", "_ANY.json" of KEY_ANY.json, and "/_ANY.json" of
              SHARD_ANY.json: there what stands under the KEY
    key       KEY without its folder

    Raises `BadSample`.
    """
    return caption_from(_captions(content, key, where), where, temperature, draw)


def _captions(content: Mapping[str, bytes], key: str, where: str) -> object:
    """What `caption_from` chooses from."""
    about = _value(content[OBJECT], where) if OBJECT in content else None
    own = next((text_of(content[suffix], where) for suffix in TEXTS if suffix in content), None)
    named, scores = _named(content, key, where)
    if not named and not scores:
        if own is None and about is None:
            raise BadSample("missing caption", where, f"there are {', '.join(content)}")
        return about if own is None else own
    texts, plain = {}, about
    if isinstance(about, Mapping):
        texts = {name: text for name, text in about.items() if isinstance(text, str)}
        plain = about.get(field_of(about))
    own = plain if own is None else own
    texts |= ({} if own is None else {"prompt": own}) | named
    scored = [name for name in scores if isinstance(texts.get(name), str)]
    if scored:
        return {"captions": [texts[n] for n in scored], SCORES: [scores[n] for n in scored]}
    own = own if isinstance(own, list) else [own] if own is not None else []
    return [*own, *named.values()]


def _named(content: Mapping[str, bytes], key: str, where: str) -> tuple[dict[str, str], dict[str, float]]:
    """Captions and scores by NAME."""
    named, scores = {}, {}
    for suffix in sorted(content):
        if suffix in OWN:
            continue
        values = _value(content[suffix], where)
        if suffix.startswith("_"):  # a file of this picture, which need not be Sana's
            values = values.get(key, {}) if isinstance(values, Mapping) else {}
        if not isinstance(values, Mapping):
            raise BadSample("unreadable caption", where, "not a JSON object")
        if suffix.endswith(SCORE_FILES):
            scores |= {name: _number(score, where) for name, score in values.items()}
            continue
        texts = {name: text for name, text in values.items() if isinstance(text, str)}
        if "prompt" in texts:  # not to be taken for the picture's own
            texts[suffix.lstrip("/").removesuffix(".json")] = texts.pop("prompt")
        named |= texts
    return named, scores


def text_of(content: bytes, where: str) -> str:
    """UTF-8. Raises `BadSample` that says what else it is."""
    try:
        return decode(content, "it").replace("\r\n", "\n")
    except SprintError as error:
        raise BadSample("unreadable caption", where, str(error)) from error


def _value(content: bytes, where: str) -> object:
    try:
        return parse_json(decode(content, "it"), "it")
    except SprintError as error:
        raise BadSample("unreadable caption", where, str(error)) from error


def _number(value: object, where: str) -> float:
    try:
        return float(value)  # Sana writes them as text
    except (TypeError, ValueError, OverflowError) as error:
        raise BadSample("unreadable caption", where, f"a score is no number: {str(value)[:40]!r}") from error
