"""What a model may be called: a built-in name, a folder or a hub id."""

from pathlib import Path

BUILT_IN = {"tiny": Path(__file__).parents[1] / "lab" / "tiny"}


def resolve(name: str) -> str:
    """A built-in family's folder, or the name unchanged (a path or a hub id)."""
    return str(BUILT_IN.get(name, name))
