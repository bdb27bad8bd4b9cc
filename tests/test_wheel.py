"""The wheel holds what a command needs outside a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # setuptools takes some seconds
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "recipes", "sprint")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by setuptools in a copy, so that no build folder is left in the checkout or read from it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in NEEDED:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(ROOT / name, source / name)
    program = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def test_everything_in_the_package_is_in_the_wheel(wheel):
    """Every file of sprint/ that is under version control or would be: code, weights, styles, types, recipes."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("sprint/")}
    there = {
        str((Path(folder) / file).relative_to(ROOT))
        for folder, _, files in os.walk(ROOT / "sprint", followlinks=True)
        for file in files
        if "__pycache__" not in folder and not file.endswith(".md")
    }
    assert inside == there
    assert {f"sprint/recipe/shipped/{file.name}" for file in (ROOT / "recipes").glob("*.yaml")} <= inside
    assert {"sprint/py.typed", "sprint/pages/report.css", "sprint/lab/tiny/sprint.json"} <= inside


def test_recipes_of_the_wheel_are_those_of_the_repository(wheel):
    with zipfile.ZipFile(wheel) as archive:
        for file in (ROOT / "recipes").glob("*.yaml"):
            assert archive.read(f"sprint/recipe/shipped/{file.name}") == file.read_bytes()


def test_built_in_things_are_found_outside_a_checkout(wheel, tmp_path):
    """Unpacked, and nothing of the checkout on the path: the command lists recipes, and tiny has its teacher."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    program = """if True:
        from pathlib import Path
        import sprint.cli.main as cli
        from sprint.base.names import resolve
        from sprint.recipe.load import load_recipe
        print(cli.__file__, resolve(load_recipe("tiny").teacher), sep="\\n")
        cli.main(["recipes"])
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "empty",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, teacher, first, *_ = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path / "site")
    assert Path(teacher, "transformer", "config.json").is_file()
    assert first.split()[0] == sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))[0]
