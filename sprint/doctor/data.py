"""A data set: what is in it, what is wrong with it, and its first pictures as a page."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sprint.base.door import shown
from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.data.batch import Encoded
from sprint.data.cache.items import CACHE, check_trajectories, read_settings
from sprint.data.items import BadSample, Items
from sprint.data.look import Facts, Shown, look
from sprint.data.source import open_items
from sprint.data.walk import SINGLE
from sprint.doctor.findings import Finding, note, ok, refused, wrong
from sprint.pages import html
from sprint.pages.pictures import Cell, PictureRow, picture_rows
from sprint.recipe.kinds import kind_of
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Data, DataKind, Recipe

ANY_RECIPE = "0.6b"  # whose defaults a data set is looked at with: 1024 pixels
MOST = 0.5  # share of the samples from which on something is wrong, and not just worth a note
FEW = 0.01
LATENTS = 64  # that are read for their scale
DEVIATION, MEAN = (
    (0.5, 2.0),
    0.5,
)  # of latents: the network expects a deviation of about 1, and a mean of about 0
QUICK, QUICK_SECONDS = 100, 10.0  # of a recipe's data

RESCALE = (
    "latents are scaling_factor · encoding, so that their deviation is about 1 (σ_d = 0.5 is applied on top): "
    "make the cache anew with `sprint cache`, or multiply them by the autoencoder's scaling_factor"
)


def examine_data(path: str, overrides: Sequence[str], out: Path) -> list[Finding]:
    """path        of pictures, tars, a cache, prompts, or a data set's hub id
    overrides   "data.size=512", say
    out         folder for the page of first pictures
    """
    data = data_of(path, overrides)
    try:
        if data.kind is DataKind.cache:
            return examine_cache(data)
        facts = look(data)
    except SprintError as error:
        return [refused("data", error)]
    return findings_of(facts) + _sheet(facts, out / f"{Path(path).resolve().name or 'data'}.html")


def examine_recipe_data(recipe: Recipe) -> list[Finding]:
    """A quick look at what a recipe reads; nothing is fetched."""
    data = recipe.data
    if data.kind is DataKind.scenes:
        return [ok("data", "the built-in scenes, drawn while training")]
    if data.kind is DataKind.huggingface and not Path(data.path).exists():
        return [note("data", f"{data.path} is no folder here: the datasets library may download it")]
    try:
        if data.kind is DataKind.cache:
            check_trajectories(open_items(data), recipe)
            return examine_cache(data)
        return findings_of(look(data, QUICK, first=0, seconds=QUICK_SECONDS))
    except SprintError as error:
        return [refused("data", error)]


def data_of(path: str, overrides: Sequence[str] = ()) -> Data:
    """As a recipe would name it. Raises SprintError where nobody can tell the kind."""
    given = {override.partition("=")[0] for override in overrides}
    kind = kind_of(path)
    if kind is None and "data.kind" not in given:
        way = SINGLE.get(Path(path).suffix.lower(), "say data.kind=folder, webdataset, …")
        raise SprintError(f"{shown(path)}: which kind of data is that? {way[0].upper()}{way[1:]}")
    told = [f"data.kind={kind.value}"] if "data.kind" not in given else []
    data = load_recipe(ANY_RECIPE, [f"data.path={path}", *told, *overrides]).data
    made = Path(path) / CACHE
    if data.kind is DataKind.cache and made.is_file() and "data.size" not in given:
        data = replace(data, size=read_settings(made)[0].data.get("size", data.size))
    return data


# ---- pictures and captions ------------------------------------------------------------------------------


def findings_of(facts: Facts) -> list[Finding]:
    data, good = facts.data, facts.looked_at - facts.bad.total()
    findings = [ok("data", "; ".join(facts.lines()))]
    if facts.bad:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in facts.bad.most_common())
        stops = facts.bad.total() > data.bad_share * facts.looked_at
        findings.append(
            (wrong if stops else note)(
                "bad samples",
                f"{facts.bad.total():,} of {facts.looked_at:,}: {reasons}; {'; '.join(facts.examples)}",
                f"mend or remove them; a run stops above data.bad_share = {data.bad_share:g}",
            )
        )
    if facts.small:
        findings.append(
            _by_share(
                facts.small / good,
                "small",
                f"{facts.small:,} of {good:,} pictures are smaller than {data.size} pixels and would be enlarged",
                f"take larger pictures, or say data.size={_size_that_fits(facts)}",
            )
        )
    if facts.repeated > FEW * good:
        text = f"{facts.repeated:,} of {good:,} pictures are byte for byte another one"
        findings.append(_by_share(facts.repeated / good, "repeated", text, "remove the copies"))
    count, caption = facts.same_caption
    if count > max(1, FEW * good):
        text = f"{count:,} of {good:,} captions are the same: {shown(caption, 80)!r}"
        cure = "say what sets the pictures apart: a network trained on one caption does not read it"
        findings.append(_by_share(count / good, "captions", text, cure))
    return findings


def _by_share(share: float, about: str, what: str, do: str) -> Finding:
    return (wrong if share > MOST else note)(about, what, do)


def _size_that_fits(facts: Facts) -> int:
    """Of most pictures the shorter side, cut to a multiple of 32."""
    return max(32, min(facts.heights.median, facts.widths.median) // 32 * 32)


def _sheet(facts: Facts, file: Path) -> list[Finding]:
    if not facts.first:
        return []
    rows = [_row(one) for one in facts.first]
    drawn, _ = picture_rows([("as a run sees it", "resized and cropped")], rows)
    head = html.masthead("data", str(facts.data.path), "; ".join(facts.lines()))
    write_whole(file, html.page(str(facts.data.path), [head, html.section("First pictures", drawn)]))
    return [ok("sheet", f"the first {len(rows)} pictures with their captions: {file}")]


def _row(one: Shown) -> PictureRow:
    return PictureRow(one.caption, one.where, [Cell(one.picture)])


# ---- latents --------------------------------------------------------------------------------------------


def examine_cache(data: Data) -> list[Finding]:
    """Latents and texts as they are stored. Raises SprintError for a cache that cannot be opened."""
    items = open_items(data)
    encoded, bad = _some(items)
    whole = " with the teacher's trajectories" * any(one.trajectory is not None for one in encoded)
    looked = f"{len(items):,} samples{whole}, {len(encoded) + len(bad)} looked at"
    findings = [ok("data", f"cache {data.path}: {looked}")]
    if bad:
        text = f"{len(bad)} cannot be used: {bad[0]}"
        findings.append(wrong("bad samples", text, "make the cache anew, or remove them"))
    return findings + latents([one.latent for one in encoded]) + texts([one.text for one in encoded])


def _some(items: Items) -> tuple[list[Encoded], list[BadSample]]:
    """Evenly over all."""
    count, encoded, bad = min(len(items), LATENTS), [], []
    for index in (k * len(items) // count for k in range(count)):
        try:
            encoded.append(items.item(index, np.random.default_rng(0)))
        except BadSample as error:
            bad.append(error)
    return encoded, bad


def latents(found: Sequence[torch.Tensor]) -> list[Finding]:
    """found: [C, h, w] each"""
    if not found:
        return []
    values = torch.cat([one.float().flatten() for one in found])
    deviation, mean = values.std().item(), values.mean().item()
    text = f"deviation {deviation:.3g}, mean {mean:.2g} (wanted: about 1 and 0)"
    if not DEVIATION[0] < deviation < DEVIATION[1] or abs(mean) > MEAN:
        return [wrong("latents", text, RESCALE)]
    if len(found) > 1 and all(torch.equal(one, found[0]) for one in found[1:]):
        return [
            wrong("latents", f"all {len(found)} are the same", "look at the pictures they were made from")
        ]
    return [ok("latents", text)]


def texts(found: Sequence[torch.Tensor]) -> list[Finding]:
    """found: [T, D] each"""
    if not found:
        return []
    lengths = sorted(len(one) for one in found)
    text = f"{lengths[0]} to {lengths[-1]} tokens"
    if len(found) > 1 and all(torch.equal(one, found[0]) for one in found[1:]):
        return [
            wrong(
                "texts",
                f"all {len(found)} are the same ({text})",
                "empty or equal captions were encoded: mend them and make the cache anew",
            )
        ]
    return [ok("texts", text)]
