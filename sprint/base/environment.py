"""The machine and the versions that a figure was measured with."""

import contextlib
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

# whose versions are told
PACKAGES = (
    *("sprint-distill", "torch", "diffusers", "transformers", "numpy", "scipy", "pillow"),
    "pytorch-fid",
)


def peak_memory() -> int:
    """Bytes: of the GPU where one is used, of this process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(device: torch.device | str | None = None) -> dict[str, str]:
    """Versions of what is installed, and the device in use: by default CUDA's where there is one."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    if torch.version.cuda:
        packages["CUDA"] = torch.version.cuda
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    return packages | {
        "python": platform.python_version(),
        "device": f"{name}, {torch.get_num_threads()} threads",
    }
