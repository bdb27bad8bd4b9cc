import os
from itertools import pairwise
from pathlib import Path

import pytest

from sprint.base.errors import SprintError
from sprint.recipe import find
from sprint.recipe.load import load_recipe, recipe_hash, recipe_text
from sprint.recipe.schema import DataKind, OptimizerKind, Precision, Recipe
from sprint.recipe.settings import each_setting, takes

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = """\
name: small
teacher: tiny
data: {size: 64}
adapt: {steps: 300, optimizer: {kind: adamw, lr: 1e-3, betas: [0.9, 0.99]}}
distill:
  optimizer: {kind: adamw, lr: 4e-4, betas: [0.9, 0.99]}
  adversarial: {taps: [1, 3, 5], optimizer: {kind: adamw, betas: [0.9, 0.99]}}
"""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def small(tmp_path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


def write(folder: Path, text: str) -> Path:
    file = folder / "some.yaml"
    file.write_text(text)
    return file


def refusal(path, *overrides: str) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(SprintError) as error:
        load_recipe(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- shipped recipes --------------------------------------------------------------------------------


def test_three_recipes_are_shipped():
    assert {"0.6b", "1.6b", "tiny"} <= {file.stem for file in SHIPPED}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipe_loads_by_path_and_by_name(file):
    recipe = load_recipe(file)
    assert recipe == load_recipe(file.stem)
    assert isinstance(recipe, Recipe)
    assert recipe.needs


@pytest.mark.parametrize(("name", "shift"), [("0.6b", 4.0), ("1.6b", 3.0)])
def test_large_recipes_carry_the_papers_settings(name, shift):
    recipe = load_recipe(name)
    adapt, distill = recipe.adapt, recipe.distill
    assert (recipe.precision, recipe.data.kind, recipe.data.size) == (Precision.bf16, DataKind.folder, 1024)
    assert (adapt.steps, adapt.batch_size, adapt.shift, adapt.caption_dropout) == (5000, 1024, shift, 0.1)
    assert (distill.steps, distill.batch_size, distill.guidance_scales) == (20000, 512, (4.0, 4.5, 5.0))
    assert (distill.consistency.time.mean, distill.consistency.time.std) == (0.2, 1.6)
    assert distill.consistency.tangent_warmup_updates == 2000
    assert distill.consistency.tangent_normalisation == 0.1
    assert (distill.adversarial.weight, distill.adversarial.taps) == (0.5, (2, 8, 14, 19))
    assert (distill.adversarial.time.mean, distill.adversarial.time.std) == (-0.6, 1.0)
    assert distill.adversarial.max_time_probability == 0.5
    for optimizer, lr in (
        (adapt.optimizer, 2e-5),
        (distill.optimizer, 2e-6),
        (distill.adversarial.optimizer, 2e-6),
    ):
        assert (optimizer.kind, optimizer.lr, optimizer.clip_norm) == (OptimizerKind.came, lr, 0.1)
        assert optimizer.betas == (0.9, 0.999, 0.9999)


# ---- overrides --------------------------------------------------------------------------------------


def test_overrides_beat_the_file_and_the_file_beats_defaults(tmp_path):
    file = write(tmp_path, "teacher: tiny\ndata: {size: 64}\nadapt: {steps: 7, batch_size: 5}\n")
    recipe = load_recipe(file, ["adapt.steps=9", "distill.optimizer.lr=2e-5", "precision=bf16"])
    assert (recipe.adapt.steps, recipe.adapt.batch_size, recipe.adapt.shift) == (9, 5, 3.0)
    assert (recipe.distill.optimizer.lr, recipe.precision) == (2e-5, Precision.bf16)


def test_lists_groups_and_text_as_overrides(small):
    recipe = load_recipe(
        small,
        [
            "distill.guidance_scales=[3, 4.5, 6]",
            "adapt.optimizer={kind: came, betas: [0.9, 0.99, 0.999]}",
            "name=007",
            "needs=a=b: {c}",
        ],
    )
    assert recipe.distill.guidance_scales == (3.0, 4.5, 6.0)
    assert recipe.adapt.optimizer.kind is OptimizerKind.came
    assert recipe.adapt.optimizer.lr == 1e-3  # a group keeps what the override does not name
    assert (recipe.name, recipe.needs) == ("007", "a=b: {c}")


def test_override_without_equals_sign(small):
    assert refusal(small, "adapt.steps") == "command line: 'adapt.steps' is not an override; write key=value"


# ---- misspelt and mistyped --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("teachr", "teacher"),
        ("adpat.steps", "adapt.steps"),
        ("distill.batchsize", "distill.batch_size"),
        ("distill.optimzer.lr", "distill.optimizer.lr"),
        ("distill.consistency.time.men", "distill.consistency.time.mean"),
        ("distill.adversarial.optimizer.beta", "distill.adversarial.optimizer.betas"),
        ("distill.taps", "distill.adversarial.taps"),  # the right name at the wrong level
        ("distill.lr", "distill.optimizer.lr"),
    ],
)
def test_misspelt_key_names_the_nearest(small, tmp_path, wrong, nearest):
    complaint = f"{wrong!r}: no such key; the nearest is {nearest}"
    assert refusal(small, f"{wrong}=1") == f"command line: {complaint}"
    *groups, name = wrong.split(".")
    nested = "".join(f"{'  ' * depth}{group}:\n" for depth, group in enumerate(groups))
    file = write(tmp_path, f"{nested}{'  ' * len(groups)}{name}: 1\n")
    message = refusal(file)  # a file may stop at a misspelt group, before its key
    assert message.startswith(f"{file}, line ")
    assert nearest.startswith(message.rpartition(" ")[2])


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("adapt.steps=many", "adapt.steps = 'many', but it takes a whole number"),
        ("adapt.steps=1.5", "adapt.steps = 1.5, but it takes a whole number"),
        ("adapt.steps=", "adapt.steps = None, but it takes a whole number"),
        ("distill.optimizer.lr=true", "distill.optimizer.lr = True, but it takes a number"),
        ("wandb=maybe", "wandb = 'maybe', but it takes true or false"),
        ("precision=fp8", "precision = 'fp8', but it takes one of fp32, bf16"),
        (
            "data.kind=tar",
            "data.kind = 'tar', but it takes one of scenes, folder, webdataset, huggingface, cache, prompts",
        ),
        ("distill.optimizer.betas=0.9", "distill.optimizer.betas = 0.9, but it takes a list of numbers"),
        (
            "distill.adversarial.taps=[1, 2.5]",
            "distill.adversarial.taps = [1, 2.5], but it takes a list of whole numbers",
        ),
        (
            "distill.student_times=[1, 2]",
            "distill.student_times = [1, 2], but it takes a list of lists of numbers",
        ),
        (
            "distill.guidance_scales=[1, [2]]",
            "distill.guidance_scales = [1, [2]], but it takes a list of numbers",
        ),
        ("distill=3", "distill = 3, but it is a group of keys, not a value"),
        (
            "evaluate.steps=[1",
            "'evaluate.steps=[1': the value is not valid YAML (expected ',' or ']', but got '<stream end>')",
        ),
    ],
)
def test_wrong_type_names_key_value_and_type(small, override, complaint):
    assert refusal(small, override) == f"command line: {complaint}"


def test_wrong_type_in_a_file(tmp_path):
    file = write(tmp_path, "adapt:\n  optimizer:\n    lr: fast\n")
    assert refusal(file) == f"{file}, line 3: adapt.optimizer.lr = 'fast', but it takes a number"


def test_broken_files(tmp_path):
    broken = write(tmp_path, "name: a\nadapt: [1\nseed: 3\n")
    assert refusal(broken).startswith(f"{broken}, line 3: not valid YAML: ")
    assert "duplicate key seed" in refusal(write(tmp_path, "seed: 1\nseed: 2\n"))
    assert "not a recipe" in refusal(write(tmp_path, "- 1\n- 2\n"))
    assert "Interpolation key 'nowhere' not found" in refusal(write(tmp_path, "teacher: ${nowhere}"))
    (tmp_path / "some.yaml").write_bytes(b"name: \xff\xfe")
    assert "is not UTF-8 text (byte 6)" in refusal(tmp_path / "some.yaml")


def test_missing_file_names_what_is_there(small, monkeypatch):
    monkeypatch.chdir(small.parent)
    built_in = sorted(file.stem for file in SHIPPED)
    there, way = f"there are {', '.join(built_in)})", "`sprint recipes 0.6b > mine.yaml` makes one to edit"
    assert refusal("huge") == f"huge: no such recipe (looked for huge and recipes/huge.yaml; {there}; {way}"
    assert "(looked for huge.yaml and recipes/huge.yaml; " in refusal("huge.yaml")
    (small.parent / "recipes").mkdir()
    small.rename("recipes/small.yaml")
    assert f"; there are {', '.join(sorted([*built_in, 'small']))});" in refusal("huge")
    assert refusal("recipes").startswith("recipes: no such recipe")  # a folder
    assert refusal("../shipped/tiny").startswith("../shipped/tiny: no such recipe")  # a path is from here
    assert load_recipe("small").name == "small"
    assert refusal("x" * 5000).startswith("x" * 200 + "…: no such recipe: ")


def test_a_path_wins_over_recipes_here_and_those_over_the_built_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("tiny") == load_recipe(ROOT / "recipes" / "tiny.yaml")
    (tmp_path / "recipes").mkdir()
    Path("recipes/tiny.yaml").write_text(SMALL)
    assert load_recipe("tiny").name == "small"
    Path("tiny").write_text(SMALL.replace("small", "nearest"))
    assert load_recipe("tiny").name == "nearest"


def test_an_error_says_which_file_it_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find, "SHIPPED", tmp_path / "built in")
    for folder in (find.SHIPPED, find.OWN):
        folder.mkdir()
        (folder / f"wrong-{folder.name[0]}.yaml").write_text("sed: 1")
    assert refusal("wrong-b") == "built-in recipe wrong-b, line 1: 'sed': no such key; the nearest is seed"
    assert refusal("wrong-r").startswith("recipes/wrong-r.yaml, line 1: 'sed': no such key")


# ---- validation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("adapt.steps=-1", "adapt.steps = -1, but it must be at least 0 and at most 1,000,000,000"),
        ("adapt.batch_size=0", "adapt.batch_size = 0, but it must be at least 1 and at most 1,000,000,000"),
        (
            "distill.batch_size=1",
            "misaligned pairs need at least 2 neighbours, and a share of 1 in groups of 4 leaves 1 alone; "
            "change distill.batch_size or distill.adversarial.neighbours",
        ),
        ("adapt.caption_dropout=1.1", "adapt.caption_dropout = 1.1, but it must be between 0 and 1"),
        ("adapt.optimizer.lr=0", "adapt.optimizer.lr = 0.0, but it must be above 0"),
        ("adapt.optimizer.lr=.nan", "adapt.optimizer.lr = nan, but it must be above 0"),
        ("distill.ema_decay=1", "distill.ema_decay = 1.0, but it must be at least 0 and below 1"),
        ("text.max_length=1", "text.max_length = 1, but it must be at least 2 and at most 1,000,000,000"),
        (
            "distill.optimizer.kind=came",
            "distill.optimizer.betas = [0.9, 0.99], but came takes 3 numbers in [0, 1)",
        ),
        (
            "adapt.optimizer.betas=[0.9, 1]",
            "adapt.optimizer.betas = [0.9, 1.0], but adamw takes 2 numbers in [0, 1)",
        ),
        (
            "distill.adversarial.taps=[3, 1]",
            "distill.adversarial.taps = [3, 1], but blocks are counted from 0 and listed once, in order",
        ),
        ("distill.adversarial.taps=[]", "distill.adversarial.taps is empty, but its weight is not 0"),
        ("evaluate.steps=[0]", "evaluate.steps = [0], but a student takes 1 to 4 steps"),
        ("evaluate.steps=[5]", "evaluate.steps = [5], but a student takes 1 to 4 steps"),
        (
            "distill.student_times=[[1.5, 0.8]]",
            "distill.student_times = [[1.5, 0.8]]: times must fall strictly and end at 0, not [1.5, 0.8]",
        ),
        (
            "distill.student_times=[[1.5, 0.8, 0], [1.5, 0.7, 0]]",
            "distill.student_times = [[1.5, 0.8, 0.0], [1.5, 0.7, 0.0]], but it takes one list at most for each of "
            "1 to 4 steps",
        ),
        (
            "distill.guidance_scales=[]",
            "distill.guidance_scales = [], but it takes one or more numbers from 0 to 1,000",
        ),
        ("teacher=", "teacher is empty; set a built-in name, a folder, a file or a hub id"),
        ("data.kind=folder", "data.kind = folder needs data.path"),
        ("data.size=128", "data.size = 128, but scenes are drawn at 64 pixels"),
    ],
)
def test_values_that_cannot_work(small, override, complaint):
    assert refusal(small, override) == f"recipe small: {complaint}"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp"])
def test_name_must_be_a_folder_name(small, name):
    assert "cannot name a folder in runs/" in refusal(small, f"name={name}")


def test_relations_between_keys(small):
    off = "distill.adversarial.weight=0"
    assert "nothing to train on" in refusal(small, off, "distill.consistency.weight=0")
    assert load_recipe(small, [off, "distill.consistency.weight=0", "distill.matching.weight=1"])
    warm = (
        "distill.consistency.weight=0",
        "distill.self_consistency=0",
        "distill.adversarial.warmup_steps=9",
    )
    assert "no other term to train on meanwhile" in refusal(small, *warm)
    assert load_recipe(small, [*warm, "distill.matching.weight=1"])
    added = ("engine=ddp", "shard_teacher=true", "distill.matching={weight: 1, lora_rank: 4}")
    assert "stands on the teacher's whole weights" in refusal(small, *added)
    came = "distill.matching.optimizer={kind: came, betas: [0.9, 0.99, 0.999]}"
    refused = refusal(small, "engine=zero2", "distill.matching.weight=1", came)
    assert "CAME needs whole rows" in refused and "adamw optimizer in distill.matching.optimizer" in refused
    assert load_recipe(small, ["engine=zero2", "distill.matching={weight: 1, lora_rank: 4}", came])
    assert "matching.optimizer.betas" in refusal(small, "distill.matching.optimizer.betas=[0.9]")
    assert "looks at LADD's samples" in refusal(small, off, "distill.self_consistency=1")
    assert "FID needs at least 2" in refusal(small, "evaluate.prompts=1")
    assert load_recipe("0.6b", ["evaluate.prompts=1"])
    assert load_recipe(small, [off, "distill.batch_size=1"])
    odd, separate = "distill.batch_size=10", "distill.adversarial.norm_groups=separate"
    assert load_recipe(small, [odd]) and load_recipe(small, [off, odd])
    assert "samples of another kind would fill their group" in refusal(small, odd, separate)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["distill.adversarial.weight=0", "distill.adversarial.taps=[1]"], "distill.adversarial.weight is 0"),
        (["distill.adversarial={weight: 0, neighbours: 2}"], "distill.adversarial.weight is 0"),
        (["adapt.steps=0", "adapt.optimizer.lr=1e-5"], "adapt.steps is 0"),
        (["distill.steps=0", "distill.optimizer={lr: 1e-5}"], "distill.steps is 0"),
        (
            ["distill.consistency.normalise_tangent=false", "distill.consistency.tangent_normalisation=1"],
            "distill.consistency.normalise_tangent is false",
        ),
        (["distill.adversarial={weight: 0, renoising: separate}"], "distill.adversarial.weight is 0"),
        (["distill.consistency.weight=0", "distill.null_mask=prompts"], "distill.consistency.weight is 0"),
        (["distill.adversarial={weight: 0, loss: relativistic}"], "distill.adversarial.weight is 0"),
        (["distill.adversarial.sigma=0.2"], "distill.adversarial.r1 and r2 are 0"),
        (["distill.matching.rollout=2"], "distill.matching.weight is 0"),
        (["distill.matching={lora_rank: 2}"], "distill.matching.weight is 0"),
        (["distill.trajectories.steps=8"], "distill.trajectories.states is 0"),
        (
            [
                "distill={trajectories: {states: 4}, adversarial: {weight: 0}}",
                "distill.consistency.time.mean=0",
            ],
            "states of trajectories have the times of the teacher's steps",
        ),
        (
            [
                *("distill.trajectories.states=4", "adapt.steps=0"),
                "data={kind: prompts, path: p.txt, teacher_steps: 8}",
            ],
            "trajectories have steps and scales of their own, in distill",
        ),
        (["products=fastest", "precision=bf16"], "precision = bf16 multiplies bf16 factors everywhere"),
        (["shard_teacher=true"], "engine = single has nobody to share with"),
    ],
)
def test_an_override_that_nothing_reads(small, overrides, complaint):
    assert f"and nothing reads it: {complaint}; leave it out" in refusal(small, *overrides)


# ---- text and hash ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_text_reads_back_as_the_same_recipe(file, tmp_path):
    recipe = load_recipe(file)
    again = load_recipe(write(tmp_path, recipe_text(recipe)))
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


def test_hash_changes_with_what_determines_the_result_only(small):
    original = recipe_hash(load_recipe(small))
    assert len(original) == 12
    for same in ("log_every=1", "save_every=7", "wandb=true", "name=other", "needs=luck", "adapt.steps=300"):
        assert recipe_hash(load_recipe(small, [same])) == original, same
    how = (
        "engine=ddp",
        "micro_batch_size=4",
        "activation_checkpointing=true",
        "timeout=60",
        "data.workers=3",
    )
    assert recipe_hash(load_recipe(small, ["engine=ddp", "shard_teacher=true"])) == original
    for same in (*how, "data.bad_share=0.5"):
        assert recipe_hash(load_recipe(small, [same])) == original, same
    different = [
        "seed=1",
        "adapt.steps=301",
        "distill.optimizer.lr=4.1e-4",
        "distill.adversarial.time.mean=-0.7",
        "evaluate.prompts=60",
    ]
    assert len({recipe_hash(load_recipe(small, [key])) for key in different} - {original}) == len(different)


def test_hash_does_not_tell_whole_numbers_from_equal_floats():
    one, other = Recipe(), Recipe()
    one.adapt.shift, other.adapt.shift = 3, 3.0
    assert recipe_hash(one) == recipe_hash(other)


def test_a_path_given_twice_is_refused(small):
    """What the shell makes of data.path=x-{0..1}.tar. Of any other key the last one counts."""
    assert load_recipe(small, ["adapt.steps=3", "adapt.steps=4"]).adapt.steps == 4
    with pytest.raises(SprintError, match=r"data.path is given twice; .* quotes"):
        load_recipe(small, ["data.path=x-0.tar", "data.path=x-1.tar"])


# ---- what a field says of itself ----------------------------------------------------------------------

# By the code and the recipes of commit 5d791ca. A run's folder keeps its hash: other ones would disown every old run.
HASHES = [
    ("0.6b", [], "de647a1ac8ec"),
    ("1.6b", [], "e9c0a793001c"),
    ("4.8b", [], "42915860d8e5"),
    ("ablations", [], "bd5deca7ac54"),
    ("tiny", [], "88ff2764bfa8"),
    ("tiny", ["distill.steps=400", "name=short"], "be2fdcadabcf"),
    ("tiny", ["seed=7", "precision=bf16"], "41948da194b3"),
    ("tiny", ["distill.student_times=[]", "distill.adversarial.taps=[1,3]"], "c955cbbb3e0e"),
    (
        "0.6b",
        ["adapt.optimizer={kind: came, betas: [0.9, 0.99, 0.999]}", "data.caption_temperature=2"],
        "d8cf07e0e105",
    ),
    (
        "0.6b",
        [
            *("engine=fsdp2", "shard_size=8", "shard_teacher=true", "timeout=60", "micro_batch_size=4"),
            *("activation_checkpointing=false", "compile=true", "data.workers=2", "data.bad_share=0.5"),
            *("evaluate.batch_size=7", "save_every=7", "log_every=3", "wandb=true", "needs=luck"),
            *("arch=1.6b", "name=other"),
        ],
        "de647a1ac8ec",
    ),
    (
        "0.6b",
        [
            *("data.kind=cache", "data.path=caches/pictures", "text.instruction=false"),
            *("teacher_family=tiny", "data.aspect_buckets=true"),
        ],
        "2cc17241731f",
    ),
]


@pytest.mark.parametrize(("name", "overrides", "expected"), HASHES)
def test_hash_of_a_run_made_before(name, overrides, expected):
    assert recipe_hash(load_recipe(name, overrides)) == expected


@pytest.mark.parametrize(
    ("key", "value", "as_before"),
    [
        ("distill.adversarial.norm_groups", "separate", "mixed"),
        ("distill.adversarial.renoising", "separate", "shared"),
        ("distill.null_mask", "prompts", "own"),
        ("distill.adversarial.loss", "relativistic", "hinge"),
        ("distill.adversarial.r1", "1", "0"),
        ("distill.adversarial.warmup_steps", "5", "0"),
        ("distill.matching.weight", "0.01", "0"),
        ("distill.depth", "8", "0"),
    ],
)
def test_a_setting_that_came_later_counts_where_it_changes_something(key, value, as_before):
    plain = recipe_hash(load_recipe("tiny"))
    assert recipe_hash(load_recipe("tiny", [f"{key}={as_before}"])) == plain
    assert recipe_hash(load_recipe("tiny", [f"{key}={value}"])) != plain


def test_every_number_has_a_range():
    ranged = {key for key, field, _ in each_setting(Recipe()) if takes(field)}
    numbers = {key for key, _, value in each_setting(Recipe()) if type(value) in (int, float)}
    assert ranged == numbers


def test_defaults_are_in_their_ranges():
    assert [
        key for key, field, value in each_setting(Recipe()) if takes(field) and not takes(field).holds(value)
    ] == []


# a list of nine times the list before it, and so on: nine to the sixth values in 200 bytes
NINE_FOLD = ", ".join(f"&{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in pairwise(["z", *"bcdefg"]))
NINE_FOLD = "&z [y], " + NINE_FOLD


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seed: !!int x", "'x' is not a value of tag:yaml.org,2002:int"),
        ("seed: !!int ''", "'' is not a value of tag:yaml.org,2002:int"),
        ("seed: " + "9" * 5000, "is not a value of tag:yaml.org,2002:int"),
        ("evaluate: {steps: " + "[" * 200 + "]" * 200 + "}", "nested more than 20 levels deep"),
        ("evaluate: &a {steps: *a}", "more than 10,000 values, written out"),
        (
            "name: &a [x, x, x, x, x, x, x, x, x, x, " + NINE_FOLD + "]",
            "more than 10,000 values, written out",
        ),
        ("name: !!python/object/apply:os.getcwd []", "not valid YAML: could not determine a constructor"),
        ('name: "a\\0b"', "name = 'a\\x00b', but no name or path holds a NUL"),
        ("adapt: {shift: " + "9" * 400 + "}", "but it takes a number"),
    ],
    ids=["tag", "tag of nothing", "digits", "deep", "itself", "laughs", "object", "nul", "no float"],
)
def test_yaml_that_is_no_value_ends_in_one_line(tmp_path, text, complaint):
    file = write(tmp_path, text + "\n")
    message = refusal(file)
    assert message.startswith(f"{file}, line 1: ") and complaint in message


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ('adapt.steps=!!int "x"', "the value is not valid YAML"),
        ("evaluate.steps=" + "[" * 2000, "the value is not valid YAML"),
        ("seed=1234567890123456789012345", "but it must be at least 0 and below 2**62"),
        ("micro_batch_size=-4", "micro_batch_size = -4, but it must be at least 0"),
        ("name=a\udcffb", "name = 'a\\udcffb', but a recipe is text in UTF-8"),
        ("=!!int", "'=!!int': the value is not valid YAML"),
    ],
    ids=["tag", "deep", "long seed", "below 0", "no UTF-8", "tag of nothing"],
)
def test_overrides_that_are_no_value_end_in_one_line(small, override, complaint):
    assert complaint in refusal(small, override)


def test_a_recipe_is_a_small_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "is a pipe or a device, not a file" in refusal(tmp_path / "pipe.yaml")
    assert "is a pipe or a device, not a file" in refusal("/dev/zero")
    assert "has 100,000 bytes; such a file has at most" in refusal(write(tmp_path, "#" * 100_000))
    (tmp_path / "wide.yaml").write_text("name: a\n", encoding="utf-16")
    assert "is UTF-16" in refusal(tmp_path / "wide.yaml")
    assert "no such recipe" in refusal("a\0b")


@pytest.mark.parametrize(
    "override",
    [
        *(f"{key}={'9' * 25}" for key in ("timeout", "save_every", "adapt.batch_size", "data.workers")),
        *(f"distill.guidance_scales=[{scale}]" for scale in ("1e308", "-1", ".nan", ".inf")),
        "evaluate.guidance_scale=1e308",
        "seed=4611686018427387904",
        "seed=2020-01-01",
        "seed=!!binary aGVsbG8=",
    ],
)
def test_numbers_that_no_run_means(small, override):
    assert len(refusal(small, override)) < 200
