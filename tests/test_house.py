"""The house: every folder imports only from the floors below it, nothing runs in a circle, names are their own."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    *("base", "maths", "pages", "lab", "recipe", "models", "weights", "engine", "sample", "data"),
    *("evaluate", "train", "doctor", "cli", "__init__", "__main__"),
)
ABOVE = ("sprint", "tools", "tests")  # a package imports from itself and from those before it
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ABOVE
    for file in sorted((ROOT / package).rglob("*.py"))
}


def imports(name: str) -> set[str]:
    """Modules of this repository that a module imports, anywhere in it; of `import a.b` and `from a import b` a.b."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {one for one in found if one in MODULES and one not in ABOVE}


def floor(name: str) -> int:
    """Packages stand on each other, and in sprint so do folders."""
    package, *folder = name.split(".")[:2]
    return (
        FLOORS.index(folder[0] if folder else "__init__")
        if package == "sprint"
        else 100 + ABOVE.index(package)
    )


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_from_above(name):
    above = sorted(other for other in imports(name) if floor(other) > floor(name))
    assert above == []


def test_no_module_imports_itself_through_others():
    below = {name: imports(name) - {name} for name in MODULES}
    while free := [name for name, others in below.items() if not others]:
        below = {name: others - set(free) for name, others in below.items() if name not in free}
    assert sorted(below) == []


def defined(name: str) -> set[str]:
    """Public names of a module's own: functions, classes and constants."""
    found = set()
    for node in ast.parse(MODULES[name].read_text(encoding="utf-8")).body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        found |= {getattr(one, "name", getattr(one, "id", "_")) for one in targets}
    return {one for one in found if not one.startswith("_")}


def test_a_public_name_has_one_module_in_its_folder():
    homes = Counter(
        (MODULES[m].parent, name) for m in MODULES if m.startswith("sprint") for name in defined(m)
    )
    twice = [f"{folder.relative_to(ROOT)}: {name}" for (folder, name), count in homes.items() if count > 1]
    assert [
        one for one in sorted(twice) if not one.endswith(": log")
    ] == []  # every module may have its logger
