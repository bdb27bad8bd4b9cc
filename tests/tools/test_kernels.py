"""The matrix of kernels: what counts as numeric, what each variant asks for, and that a failure is one."""

import pytest

from tools.kernels import __main__ as kernels

GREEN = kernels.Result(3, 1, [], 2.0, "")


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """By variant, the modules it was asked for; "aten avx2" fails a test."""
    asked = {}

    def run(variant, modules):
        asked[variant] = [module.stem for module in modules]
        return (
            GREEN._replace(failed=["tests.test_a::test_b"], said="why") if variant == "aten avx2" else GREEN
        )

    monkeypatch.setattr(kernels, "run", run)
    monkeypatch.setattr(kernels, "KEPT", tmp_path / "runs" / "kernels.json")
    monkeypatch.setattr(kernels, "bits", lambda variant: {"sum": variant[:4]})
    return asked


def test_numeric_is_what_imports_tolerances():
    names = [file.stem for file in kernels.numeric_modules()]
    assert {"test_tolerance", "test_distill_state", "test_smoke"} <= set(names) and "test_slurm" not in names
    assert [file.stem for file in kernels.numeric_modules(["test_view"])] == ["test_view"]


def test_a_variant_adds_to_the_environment_and_leaves_no_other_in_it(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "AVX")
    assert "MKL_CBWR" not in kernels.environment("as it is")
    assert kernels.environment("as it is")["OMP_NUM_THREADS"] == "1"
    assert kernels.environment("two threads")["OMP_NUM_THREADS"] == "2"
    assert kernels.environment("the least of all").items() >= kernels.LEAST.items()


def test_the_table_says_what_was_run_and_what_differs(ran, capsys):
    assert kernels.main(["--quick"]) == 0
    assert list(ran) == list(kernels.QUICK) and set(ran[kernels.QUICK[0]]) == set(kernels.QUICK_MODULES)
    *_, least, two = capsys.readouterr().out.splitlines()
    assert least.split() == ["the", "least", "of", "all", "3", "1", "0", "2", "sum"] and two.split()[:2] == [
        "two",
        "threads",
    ]


def test_one_failure_in_one_variant_is_exit_code_one_and_is_named(ran, capsys):
    assert kernels.main(["--jobs", "2", "--modules", "test_view"]) == 1
    assert list(ran) and ran["as it is"] == ["test_view"] and ran.keys() == kernels.VARIANTS.keys()
    assert "why" in (said := capsys.readouterr().out)
    assert said.endswith("FAILED under aten avx2: tests.test_a::test_b\n")


def test_what_was_green_is_not_run_again_until_something_changes(ran, capsys):
    command = ["--modules", "test_view"]
    assert kernels.main(command) == 1 and ran.keys() == kernels.VARIANTS.keys()
    first = capsys.readouterr().out
    ran.clear()
    assert kernels.main(command) == 1 and list(ran) == ["aten avx2"]
    assert capsys.readouterr().out == first
    ran.clear()
    assert kernels.main(["--modules", "test_view", "test_tolerance"]) == 1
    assert ran.keys() == kernels.VARIANTS.keys()  # another list of modules


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modules", "test_slurm"], "no numeric test module test_slurm"),
        (["--jobs", "0"], "at least 1"),
        (["--only", "x"], "x"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_two(ran, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        kernels.main(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err
