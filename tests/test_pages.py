"""The pages: every command on them is one that its program takes, every path and link leads somewhere.

Commands are read by what reads them in earnest: the verbs' parser, the recipes' loader, `make -n`, the tools' own
parsers, torchrun's. Nothing is run but the README's Python.
"""

import argparse
import ast
import importlib
import pkgutil
import re
import shlex
import subprocess
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import sprint as package
from sprint.cli import main as command_line
from sprint.cli.cache import implied
from sprint.lab.categories import category_title
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Recipe
from sprint.weights.export import export_student
from tests.sample.test_generate import mini_family, mini_student

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(page for top in ("recipes", "sprint", "tools") for page in (ROOT / top).rglob("*.md")),
]
SECOND_SCREEN = "## I want to …"
ENTRIES = ("recipes", "sprint", "tests", "tools")  # of the repository, which a path may begin with
GROUPS = ("data", "text", "adapt", "distill", "evaluate")  # of a recipe, which a key may begin with
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(rf"(?:{'|'.join(ENTRIES)})(?:/[\w.-]+)*/?")
DOTTED = re.compile(r"(?:sprint|tools|tests)(?:\.(?!json$)\w+)+")
KEY = re.compile(rf"((?:{'|'.join(GROUPS)})(?:\.\w+)+)(?:=.*)?")

pytestmark = pytest.mark.usefixtures("in_the_repository")


@pytest.fixture
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def label(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- what is on a page ------------------------------------------------------------------------------


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def inline(page: Path) -> list[str]:
    """Code in running text, on one line each."""
    return [
        " ".join(code.split()) for code in INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    ]


def commands(page: Path) -> list[str]:
    """Lines of shell blocks, and code in the text that begins like a command and has arguments."""
    shell = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    begun = ("sprint ", "make ", "torchrun ", "python -m ", "pip ", "sbatch ")
    return [line.strip() for line in shell if line.strip()] + [
        code for code in inline(page) if code.startswith(begun)
    ]


def anchors(page: Path) -> set[str]:
    """What #… may say, as GitHub makes it of headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


# ---- commands -----------------------------------------------------------------------------------------


class Parsed(Exception):
    """A program has read its arguments, and goes no further."""


def check(command: str) -> None:
    """Raise AssertionError, SprintError or SystemExit for a command that would be refused."""
    words = shlex.split(command, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    programs = {
        "sprint": check_verb,
        "make": check_make,
        "python": check_python,
        "torchrun": check_torchrun,
        "pip": check_pip,
        "sbatch": check_sbatch,
        "source": lambda words: None,
    }
    assert Path(program).name in programs, f"{command}: which program is that?"
    programs[Path(program).name](rest)


def check_verb(words: list[str]) -> None:
    """A bare verb is spoken of, and not a command."""
    verbs = command_line.build_parser()._subparsers._group_actions[0].choices
    if len(words) == 1 and words[0] in verbs:
        return
    args = command_line._parse(words)
    if hasattr(args, "overrides"):
        meant = implied(args) if "trajectories" in args else []
        # `sprint doctor` takes the same keys for whatever it looks at
        check_recipe(getattr(args, "recipe", "0.6b"), [*args.overrides, *meant])


def check_recipe(name: str, overrides: list[str]) -> None:
    """RECIPE stands for any, NAME.yaml for one that the reader has made of any."""
    stands_for_any = name == "RECIPE" or (name.endswith(".yaml") and not Path(name).exists())
    load_recipe("tiny" if stands_for_any else name, overrides)


def check_make(words: list[str]) -> None:
    """Every target and variable is there, and what it would start is checked like a command of the page."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, given, _ = word.partition("=")
        assert re.search(rf"^{name} *[?:]?=" if given else rf"^{name}:", makefile, re.MULTILINE), word
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if re.match(r"\S*bin/(sprint|python -m (tools|torch))", line):
            check(line)


def check_python(words: list[str]) -> None:
    flag, module, *rest = words
    assert flag == "-m", words
    if module == "torch.distributed.run":
        check_torchrun(rest)
    elif module == "sprint":
        check_verb(rest)
    else:
        check_tool(module, rest)


def check_tool(module: str, words: list[str]) -> None:
    assert module.startswith("tools."), module
    folder = (ROOT / module.replace(".", "/")).is_dir()
    program = importlib.import_module(f"{module}.__main__" if folder else module)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr("sys.argv", [module, *words])
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        program.main()


def stopping(read: Callable) -> Callable:
    """A parser's method that ends the program once all is read."""

    def read_and_stop(parser, args=None, namespace=None):
        read(parser, args, namespace)
        raise Parsed

    return read_and_stop


def check_torchrun(words: list[str]) -> None:
    if len(words) == 1 and words[0].startswith("--"):  # an option is spoken of
        assert words[0] in get_args_parser()._option_string_actions
        return
    args = get_args_parser().parse_args(words)
    assert args.module, words
    check_python(["-m", args.training_script, *args.training_script_args])


def check_pip(words: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    known = re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE)
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(known), extras


def check_sbatch(words: list[str]) -> None:
    script, recipe, *overrides = words
    assert (ROOT / script).is_file()
    check_recipe(recipe, overrides)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_every_command_would_be_taken(page):
    for command in commands(page):
        try:
            check(command)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{label(page)}: {command}: {error or type(error).__name__}")


@pytest.mark.parametrize(
    "command",
    [
        "sprint distil tiny",
        "sprint distill tiny distill.step=4",
        "sprint distill tiny distill.steps=many",
        "sprint distill huge",
        "sprint cache 0.6b --verfy",
        "make distil",
        "make distill FOLDER=1",
        "make distill ARGS=distill.step=4",
        "make ablations ARGS=--quickly",
        "python -m tools.bench.jump",
        "python -m tools.chaos --quickly",
        "torchrun --nproc 8 -m sprint distil tiny",
        "torchrun --nproc_per_node 8 -m sprint distill tiny engine=fsdp3",
        "pip install 'sprint-distill[everything]'",
        "sbatch tools/slurm.sbatch 4.8b shards=8",
        "sprinter distill tiny",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises((Exception, SystemExit)):
        check(command)


# ---- paths, links, names --------------------------------------------------------------------------------


def wrong_words(page: Path) -> list[str]:
    """Code in the text that names a file, a module or a key of a recipe that is not there."""
    wrong = []
    for code in inline(page):
        name = code.partition(" ")[0]
        if PATH.fullmatch(name) and "/" in name:
            wrong += [] if (ROOT / name).exists() else [code]
        elif DOTTED.fullmatch(name):
            try:
                pkgutil.resolve_name(name)
            except (ImportError, AttributeError):
                wrong.append(code)
        elif match := KEY.fullmatch(code):
            try:
                attrgetter(match[1])(Recipe())
            except AttributeError:
                wrong.append(code)
    return wrong


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        there = target.exists() and (not anchor or anchor in anchors(target))
        dead += [] if "://" in link or there else [link]
    return dead


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_every_path_and_link_leads_somewhere(page):
    assert wrong_words(page) == [] and dead_links(page) == []


def test_a_wrong_path_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n`sprint/engine.py` `sprint.dual` `data.bad_shares` `runs/any` `data.bad_share`\n"
        "[one](#b) [two](#a) [three](other.md) [four](page.md#a) [five](https://x.org/y)\n"
    )
    assert wrong_words(page) == ["sprint/engine.py", "sprint.dual", "data.bad_shares"]
    assert dead_links(page) == ["#b", "other.md"]


def test_modules_that_the_code_speaks_of_are_there():
    """By path; `--help` prints most of it."""
    for file in [*(ROOT / "sprint").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        spoken_of = re.findall(
            r"(?<![\w./-])(?:sprint|tools|tests)/[\w/]+\.py\b", file.read_text(encoding="utf-8")
        )
        assert [path for path in spoken_of if not (ROOT / path).exists()] == [], label(file)


def test_the_readme_leads_to_every_page():
    seen, ahead = set(), [PAGES[0]]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        links = {(page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(page.read_text())}
        ahead += [link for link in links if link in PAGES and link not in seen]
    assert [label(page) for page in PAGES if page not in seen] == []


def test_the_tree_in_the_readme_has_every_folder():
    tree = " ".join(blocks(PAGES[0], "")[0].split())
    folders = [file.parent.name for file in (ROOT / "sprint").glob("*/__init__.py")]
    assert [name for name in folders if f" {name} " not in tree] == []


# ---- Python ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_python_names_what_the_package_has(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "sprint":
                assert hasattr(package, node.attr), node.attr


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    export_student(tmp_path / "runs/tiny/student", mini_student(), None, mini_family(), {})
    monkeypatch.chdir(tmp_path)
    code = blocks(PAGES[0], "python")
    assert len(code) == 2
    for block in code:
        exec(compile(block, "README.md", "exec"), {})
        assert Path("circle.png").stat().st_size > 0
        Path("circle.png").unlink()


# ---- length ---------------------------------------------------------------------------------------------


def test_pages_are_short():
    lines = {label(page): page.read_text(encoding="utf-8").splitlines() for page in PAGES}
    first = lines["README.md"].index(SECOND_SCREEN)
    assert first <= 60 and len(lines["README.md"]) <= 120
    assert {name: len(text) for name, text in lines.items() if len(text) > 200} == {}


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_rows_of_tables_have_the_names_of_evaluations(page):
    """A category is called by its title, whose one home is `sprint.lab.categories`, and by no tag of GenEval's."""
    rows = re.findall(r"^ *\| *([\w ]+?) *\|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert [row for row in rows if category_title(row) != row] == []
