"""What a field of the toy's config may be."""

from collections.abc import Mapping

from sprint.base.errors import SprintError
from tests.models.toy.presets import BASE


def check_config(config: Mapping, where: object) -> dict:
    fields = {key: value for key, value in config.items() if key in BASE}
    for key, value in fields.items():
        if not isinstance(value, int | float) or not 0 <= value < 1e4:
            raise SprintError(f"{where}: {key} is no number from 0 to 10,000")
    return fields
