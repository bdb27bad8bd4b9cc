"""Which operators take the time of a call, by torch's profiler.

Imported by tools/bench/flops.py; not a program.
"""

from collections.abc import Callable

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

SHOWN = 12  # operators, those with most time
REST = "all others"


def operators_of(call: Callable[[], object], device: torch.device) -> dict:
    """One call, profiled: seconds of all operators by themselves (not what they call), and those that take most.

    -> {"seconds": ..., "operators": [{"operator", "seconds", "share" of the sum, "calls"}, ..., the rest as one]}
    Times are the device's on CUDA, and include what profiling costs.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        call()
    events = profiler.key_averages()
    rows = sorted(((_seconds(each, device), each.count, each.key) for each in events), reverse=True)
    total = sum(seconds for seconds, _, _ in rows)
    others = rows[SHOWN:]
    rest = (sum(row[0] for row in others), sum(row[1] for row in others), REST)
    return {
        "seconds": total,
        "operators": [
            {"operator": name, "seconds": seconds, "share": seconds / total, "calls": calls}
            for seconds, calls, name in (*rows[:SHOWN], rest)
        ],
    }


def _seconds(event: FunctionEventAvg, device: torch.device) -> float:
    """By itself."""
    on_device = device.type == "cuda"
    return (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
