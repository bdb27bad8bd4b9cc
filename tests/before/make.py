"""Makes the artifacts of this folder, by the product's own commands, with the code of commit 5d791ca.

    git worktree add ../old 5d791ca && cp tests/before/make.py ../old/ && cd ../old
    OMP_NUM_THREADS=1 PYTHONPATH=. python make.py made.tar.xz

It imports that commit's modules, so it runs there only. Nothing that it leaves holds an absolute path.
"""

import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from PIL import Image
from sprint.data.scenes import render, scene
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from sprint.cli import main
from sprint.train.adapt import AdaptStage
from sprint.train.distill import DistillStage

WIDTH, TEXT_WIDTH, CHANNELS = 8, 8, 4
TIME = 1_600_000_000  # seconds: when every file was last written, as the archive has it
RECIPE = """\
name: mini
teacher: teacher
data: {kind: webdataset, path: shards, size: 64}
text: {max_length: 80, instruction: false}
adapt: {steps: 3, batch_size: 4, start: ones, optimizer: {kind: adamw, lr: 1e-3, betas: [0.9, 0.99]}}
distill:
  steps: 6
  batch_size: 4
  ema_decay: 0.5
  student_times: [[1.5708, 0.9, 0]]
  self_consistency: 1
  consistency: {tangent_warmup_updates: 4}
  optimizer: {kind: adamw, lr: 1e-3, betas: [0.9, 0.99]}
  adversarial: {taps: [0, 1], optimizer: {kind: adamw, lr: 1e-3, betas: [0.9, 0.99]}}
evaluate: {prompts: 0}
save_every: 2
log_every: 1
"""


def sprint(command: str) -> None:
    print(f"$ sprint {command}", file=sys.stderr)
    main(command.split())


def make_network(width: int, head: int, depth: int, **config) -> SanaTransformer2DModel:
    """No two weights are equal."""
    network = SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=width // head,
        attention_head_dim=head,
        num_layers=depth,
        num_cross_attention_heads=2,
        cross_attention_head_dim=width // 2,
        cross_attention_dim=width,
        caption_channels=TEXT_WIDTH,
        sample_size=16,
        patch_size=1,
        **config,
    )
    for name, p in network.named_parameters():
        p.data = 0.1 * torch.randn_like(p) + ("norm" in name)
    return network


def make_teacher(folder: Path) -> None:
    """A base pipeline for pictures of 64 pixels: two blocks, 8 wide."""
    torch.manual_seed(0)
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = GemmaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])
    sizes = {"hidden_size": TEXT_WIDTH, "intermediate_size": TEXT_WIDTH, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "query_pre_attn_scalar": 4}
    encoder = Gemma2Model(Gemma2Config(vocab_size=len(names), **sizes, **heads)).eval()
    ends = ("encoder", "decoder")
    stages = {f"{end}_block_types": ("ResBlock",) * 3 for end in ends}
    stages |= {f"{end}_block_out_channels": (4, 4, 4) for end in ends}
    stages |= {f"{end}_layers_per_block": (1, 1, 1) for end in ends}
    stages |= {f"{end}_qkv_multiscales": ((), (), ()) for end in ends}
    autoencoder = AutoencoderDC(latent_channels=CHANNELS, scaling_factor=0.7, **stages).eval()
    autoencoder.decoder.conv_out.weight.data.mul_(0.2)  # calm pictures make small files
    network = make_network(WIDTH, head=WIDTH // 2, depth=2, mlp_ratio=1.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    SanaPipeline(tokenizer, encoder, autoencoder, network, scheduler).save_pretrained(folder)
    text = {"max_length": 80, "instruction": False}
    (folder / "sprint.json").write_text(json.dumps({"text": text, "size": 64}))


def make_shards(folder: Path) -> None:
    """Six captioned scenes in two tars."""
    folder.mkdir()
    for shard in range(2):
        file = folder / f"{shard:05d}.tar"
        with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(3 * shard, 3 * shard + 3):
                drawn, picture = scene(0, i), BytesIO()
                Image.fromarray(render(drawn.things)).save(picture, "PNG")
                for suffix, content in (("png", picture.getvalue()), ("txt", drawn.caption.encode())):
                    entry = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    entry.size, entry.mtime = len(content), TIME
                    tar.addfile(entry, BytesIO(content))
    date(folder)


def date(folder: Path) -> None:
    """Give its tars the time that the archive gives every file: the index beside them remembers it."""
    for file in folder.glob("*.tar"):
        os.utime(file, (TIME, TIME))


def stopped(command: str, stage: type, at: int) -> None:
    """The command, with Ctrl-C while `stage` is at step `at`."""
    update = stage.update

    def interrupted(self, step, batch):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, step, batch)

    stage.update = interrupted
    try:
        sprint(command)
    except SystemExit as end:
        assert end.code == 130, end.code
    finally:
        stage.update = update
    name = command.rpartition("name=")[2]
    for older in sorted(Path("runs", name, "checkpoints").glob("*/[0-9]*"))[:-1]:
        shutil.rmtree(older)


def make() -> None:
    """Everything, in the current folder."""
    make_teacher(Path("teacher"))
    make_shards(Path("shards"))
    Path("mini.yaml").write_text(RECIPE)
    sprint("distill mini.yaml")
    stopped("distill mini.yaml name=stopped", DistillStage, at=3)
    stopped("distill mini.yaml name=early", AdaptStage, at=0)
    sprint("cache mini.yaml data.kind=scenes data.path= --count 6 --shard-size 3 --dtype fp32 -o cached")
    date(Path("cached"))
    sprint(
        "distill mini.yaml name=scored data.kind=cache data.path=cached "
        "evaluate.prompts=2 evaluate.steps=[1] evaluate.teacher_steps=2"
    )
    # Sana's own names say nothing of the heads, which are 32 wide there.
    make_network(32, head=32, depth=1, mlp_ratio=1.0).save_pretrained("wide")
    sprint("convert wide --to original --time-scale sparse -o original.safetensors")
    sprint("convert original.safetensors --cross-attention-heads 2 --time-scale sparse -o trigflow")
    shutil.rmtree("wide")
    sprint("sample runs/mini/student --prompt red --prompt blue --out pictures")
    sprint("evaluate runs/mini/student --metrics scenes --steps 1,2 --count 2 --out evaluated")
    sprint("search-steps runs/mini/student --steps 2 --prompts 2 --grid 0.7 --out searched")
    for lock in Path().rglob(".lock*"):
        lock.unlink()


def pack(out: Path) -> None:
    """The current folder as one archive, since much is there several times."""

    def nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime = TIME
        return entry

    with tarfile.open(out, "w:xz", preset=9) as archive:
        for path in sorted(Path().iterdir()):
            archive.add(path, filter=nobodys)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs do not hear it
    torch.set_num_threads(1)
    out = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make()
        pack(out)
        os.chdir(out.parent)
