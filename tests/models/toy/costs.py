"""Bytes of an update. Not measured: nobody plans a toy, but the plan must be able to ask."""

from sprint.models.teacher import Footprint
from sprint.recipe.schema import Precision

FOOTPRINTS = {precision: Footprint(*[4.0] * 12) for precision in Precision}
