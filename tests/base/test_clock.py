"""Time by part: added up by name, exclusive, and on CUDA without waiting before it is read."""

import types

import pytest
import torch

from sprint.base import clock as clock_module
from sprint.base.clock import Clock

CPU = torch.device("cpu")


@pytest.fixture
def seconds(monkeypatch):
    """A time that stands still until it is set."""
    now = types.SimpleNamespace(value=0.0)
    monkeypatch.setattr(clock_module, "time", types.SimpleNamespace(perf_counter=lambda: now.value))
    return now


def spend(clock: Clock, seconds, name: str, amount: float) -> None:
    with clock.part(name):
        seconds.value += amount


def test_parts_add_up_and_the_rest_is_other(seconds):
    clock = Clock(CPU)
    for _ in range(2):
        spend(clock, seconds, "forward", 0.5)
        spend(clock, seconds, "backward", 0.125)
    seconds.value += 1.0
    times = clock.read()
    assert times == {"forward": 1000.0, "backward": 250.0, "other": 1000.0}
    assert list(times) == ["forward", "backward", "other"]


def test_a_reading_and_a_restart_begin_anew(seconds):
    clock = Clock(CPU)
    spend(clock, seconds, "a", 1.0)
    clock.read()
    spend(clock, seconds, "b", 2.0)
    assert clock.read() == {"b": 2000.0, "other": 0.0}
    spend(clock, seconds, "c", 3.0)
    clock.restart()
    seconds.value += 4.0
    assert clock.read() == {"other": 4000.0}


def test_parts_do_not_nest_and_the_clock_goes_on_after(seconds):
    clock = Clock(CPU)
    inner = clock.part("inner")
    with pytest.raises(RuntimeError, match="'inner' inside part 'outer'"), clock.part("outer"), inner:
        pass
    spend(clock, seconds, "next", 1.0)
    assert clock.read() == {"outer": 0.0, "next": 1000.0, "other": 0.0}


def test_a_part_left_by_an_error_is_counted(seconds):
    clock = Clock(CPU)
    with pytest.raises(KeyError), clock.part("a"):
        seconds.value += 1.0
        raise KeyError
    assert clock.read() == {"a": 1000.0, "other": 0.0}


def test_cuda_events_are_recorded_at_once_and_waited_for_at_the_reading_alone(seconds, monkeypatch):
    """The device takes a second a record; the host's own time does not count."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")
            self.at = len(calls)

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, later):
            return 1000.0 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(torch.device("cuda"))
    for name in ("a", "b", "a"):
        with clock.part(name):
            seconds.value += 99.0
    assert calls == ["record"] * 7
    assert clock.read() == {"a": 2000.0, "b": 1000.0, "other": 4000.0}
    assert calls == ["record"] * 8 + ["wait"] + ["record"]
