"""Which operators take the time of a call, by torch's profiler.

Imported by tools/bench/flops.py; not a program.
"""

import time
from collections.abc import Callable

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

SHOWN = 12  # operators, those with most time
REST, BETWEEN = "all other operators", "between operators"


def operators_of(call: Callable[[], object], device: torch.device) -> dict:
    """One call, profiled: its seconds, and the operators that take most by themselves (not by what they call).

    -> {"seconds": ..., "operators": [{"operator", "seconds", "share" of the call, "calls"}, ...]}; at the end all
    others as one, and what lies between: Python on a CPU, an idle device on CUDA. Times include what profiling costs.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        call()
        if on_cuda:
            torch.cuda.synchronize(device)
        whole = time.perf_counter() - began
    events = profiler.key_averages()
    rows = sorted(((_seconds(each, on_cuda), each.count, each.key) for each in events), reverse=True)
    others = rows[SHOWN:]
    rest = (sum(row[0] for row in others), sum(row[1] for row in others), REST)
    between = (max(0.0, whole - sum(row[0] for row in rows)), 0, BETWEEN)
    return {
        "seconds": whole,
        "operators": [
            {"operator": name, "seconds": seconds, "share": seconds / whole, "calls": calls}
            for seconds, calls, name in (*rows[:SHOWN], rest, between)
        ],
    }


def _seconds(event: FunctionEventAvg, on_cuda: bool) -> float:
    """By itself."""
    return (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6
