"""A recipe on machines that cannot run it, and on one that can."""

import pytest

from sprint.base.errors import SprintError
from sprint.doctor.findings import Level
from sprint.doctor.machine import GIB, Machine, Needs, disk, memory, packages, processes, wandb_login
from sprint.doctor.recipe import examine_recipe, needs_of
from sprint.recipe.load import load_recipe
from sprint.train.plan.networks import build_networks
from tests.doctor.test_model import found, troubles

LAPTOP = Machine(cores=2, memory=16 * GIB, available=12 * GIB, gpus=())
NODE = Machine(cores=64, memory=512 * GIB, available=400 * GIB, gpus=(80 * GIB,) * 8, gpu_name="A100")
LAUNCHED = {"WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}


@pytest.fixture
def tiny():
    return load_recipe("tiny")


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """No runs, no launcher, an empty cache of the hub that nobody asks."""
    monkeypatch.chdir(tmp_path)
    for name in (*LAUNCHED, "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sprint.doctor.recipe.folder_here", lambda name: None)


def test_the_tiny_recipe_is_well_on_a_laptop():
    findings = examine_recipe("tiny", machine=LAPTOP)
    assert troubles(findings) == []
    assert {"teacher", "encoders", "folder", "machine", "packages", "memory", "disk", "data"} <= {
        one.about for one in findings
    }


def test_a_large_recipe_without_its_weights_pictures_or_gpus():
    findings = examine_recipe("0.6b", machine=LAPTOP)
    assert "will download it" in found(findings, Level.note, "teacher")
    assert "no such folder" in found(findings, Level.wrong, "data")
    assert "has 12.0 GiB" in found(findings, Level.wrong, "memory")


def test_what_is_neither_here_nor_on_the_hub(monkeypatch):
    findings = examine_recipe("tiny", ["teacher=./absent", "arch="], LAPTOP)
    assert "no such file or folder" in found(findings, Level.wrong, "teacher")
    assert "memory and disk were not checked" in found(findings, Level.note, "plan")
    findings = examine_recipe("tiny", ["teacher_family=./absent"], LAPTOP)
    assert "set teacher_family" in found(findings, Level.wrong, "encoders")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in found(examine_recipe("0.6b", machine=LAPTOP), Level.wrong, "teacher")


def test_a_recipe_that_is_none():
    with pytest.raises(SprintError, match="no such key"):
        examine_recipe("tiny", ["distil.steps=3"], LAPTOP)


def test_encoders_that_lack_a_part(tmp_path):
    (tmp_path / "family" / "vae").mkdir(parents=True)
    findings = examine_recipe("tiny", [f"teacher_family={tmp_path / 'family'}"], LAPTOP)
    assert "no tokenizer, text_encoder" in found(findings, Level.wrong, "encoders")


def test_a_folder_of_another_recipe(tmp_path):
    owner = tmp_path / "runs" / "tiny" / "recipe.hash"
    owner.parent.mkdir(parents=True)
    owner.write_text("000000000000\n")
    findings = examine_recipe("tiny", machine=LAPTOP)
    assert "holds a run of another recipe" in found(findings, Level.wrong, "folder")


def test_memory_of_a_gpu_and_of_a_laptop(tiny):
    small = Needs(memory=GIB, checkpoint=GIB, export=GIB)
    assert memory(tiny, small, NODE).level is memory(tiny, small, LAPTOP).level is Level.ok
    assert memory(tiny, small._replace(memory=75 * GIB), NODE).level is Level.wrong  # 80 less a tenth
    assert memory(load_recipe("0.6b"), small, LAPTOP).level is Level.note
    assert memory(load_recipe("0.6b"), small, NODE).level is Level.ok


def test_a_scale_that_the_student_never_learns():
    findings = examine_recipe("tiny", ["distill.guidance_scales=[1.5,2]"], LAPTOP)
    assert "the student learns distill.guidance_scales = [1.5, 2.0] alone" in found(
        findings, Level.wrong, "guidance"
    )


def test_a_checkpoint_holds_the_fake_score():
    alone, rank = load_recipe("tiny"), 4
    whole = load_recipe("tiny", ["distill.matching.weight=1"])
    added = load_recipe("tiny", [f"distill.matching={{weight: 1, lora_rank: {rank}}}"])
    networks = build_networks(alone)
    sizes = [needs_of(recipe, networks, 1).checkpoint for recipe in (alone, added, whole)]
    weights = 4 * sum(p.numel() for p in networks.adapted.parameters())
    assert 0 < sizes[1] - sizes[0] < weights < 2 * weights < sizes[2] - sizes[0] < 3 * weights  # CAME's state


def test_a_disk_that_is_too_small(tmp_path):
    needs = Needs(memory=GIB, checkpoint=2**20, export=2**20)
    assert disk(needs, tmp_path / "runs" / "x").level is Level.ok
    assert disk(needs._replace(checkpoint=2**60), tmp_path / "runs" / "x").level is Level.wrong


def test_packages_that_are_missing_or_too_old(tiny):
    assert found(packages(tiny), Level.ok, "packages")
    (finding,) = packages(tiny, ["torch>=999", "nowhere-to-be-found>=1", 'ghost; extra == "cluster"'])
    assert "torch" in finding.what and "nowhere-to-be-found is missing" in finding.what
    assert "ghost" not in finding.what  # of an extra that this recipe does not take


def test_processes_and_what_started_them(tiny):
    assert troubles(processes(tiny, LAPTOP, {})) == []
    large = load_recipe("0.6b")
    assert troubles(processes(large, NODE, LAUNCHED)) == []
    (alone,) = processes(large, NODE, {})
    assert alone.level is Level.note and "on one of 8 GPUs" in alone.what and "torchrun" in alone.do
    lost = found(processes(large, NODE, {"WORLD_SIZE": "8"}), Level.wrong, "processes")
    assert "RANK, LOCAL_RANK" in lost
    assert "no number" in found(processes(tiny, NODE, {"WORLD_SIZE": "x"}), Level.wrong, "processes")
    assert "engine = single" in found(processes(tiny, NODE, LAUNCHED), Level.wrong, "processes")
    seven = LAUNCHED | {"WORLD_SIZE": "7"}
    assert "does not divide" in found(processes(large, NODE, seven), Level.wrong, "processes")


def test_a_key_for_wandb(tmp_path):
    recipe, nobody = load_recipe("tiny", ["wandb=true"]), {"NETRC": str(tmp_path / "netrc")}
    assert wandb_login(load_recipe("tiny"), {}) == []
    assert wandb_login(recipe, nobody)[0].level is Level.ok  # offline unless told otherwise
    online = nobody | {"WANDB_MODE": "online"}
    assert "no key" in wandb_login(recipe, online)[0].what
    assert wandb_login(recipe, online | {"WANDB_API_KEY": "k"})[0].level is Level.ok
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_login(recipe, online)[0].level is Level.ok


def test_a_compiler_where_blocks_are_compiled(monkeypatch):
    monkeypatch.setattr("sprint.doctor.machine.shutil.which", lambda name: None)
    findings = examine_recipe("tiny", ["compile=true"], LAPTOP)
    assert "no C++ compiler" in found(findings, Level.wrong, "compiler")
