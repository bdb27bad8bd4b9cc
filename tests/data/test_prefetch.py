"""Batches made ahead: order, depth, threads, errors and the end."""

import threading
import time
from contextlib import closing

import pytest

from sprint.base.errors import SprintError
from sprint.data.batching import prefetch


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_gives_every_step_in_order_from_one_other_thread():
    made = []

    def make(step):
        time.sleep(0.002 * (step % 3))
        made.append(threading.get_ident())
        return step**2

    assert list(prefetch(make, 3, 12)) == [k**2 for k in range(3, 12)]
    assert len(set(made)) == 1 and made[0] != threading.get_ident()
    assert prefetch_threads() == []
    assert list(prefetch(make, 5, 5)) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_prefetch_works_ahead_but_no_further_than_one_more_than_its_threads(workers):
    made, full = [], threading.Event()

    def make(step):
        made.append(step)
        if len(made) == workers + 2:
            full.set()
        return step

    with closing(prefetch(make, 0, 100, workers)) as batches:
        assert next(batches) == 0
        assert full.wait(5)  # steps 1 … workers + 1 were made while step 0 was in use
        time.sleep(0.02)
        assert sorted(made) == list(range(workers + 2))


def test_prefetch_raises_in_turn_and_ends():
    made = []

    def make(step):
        made.append(step)
        if step == 3:
            raise SprintError("p3.png: unreadable picture")
        return step

    got = []
    with pytest.raises(SprintError, match=r"^p3.png: unreadable picture$"):
        for step in prefetch(make, 0, 100):
            got.append(step)
    assert got == [0, 1, 2]
    assert len(made) <= 6
    assert prefetch_threads() == []


@pytest.mark.parametrize("ending", [RuntimeError, KeyboardInterrupt, None])
def test_prefetch_stops_with_its_consumer(ending):
    made = []

    def consume():
        with closing(prefetch(lambda step: made.append(step) or step, 0, 10**9)) as batches:
            for step in batches:
                if step == 4:
                    if ending is None:
                        return
                    raise ending

    if ending is None:
        consume()
    else:
        with pytest.raises(ending):
            consume()
    assert prefetch_threads() == []
    assert len(made) <= 7


@pytest.mark.parametrize("workers", [2, 3])
def test_several_threads_make_steps_at_once_and_give_them_in_order(workers):
    together, threads = threading.Barrier(workers), set()

    def make(step):
        together.wait(5)  # breaks unless as many threads work at once
        threads.add(threading.get_ident())
        time.sleep(0.003 * (workers - step % workers))  # later steps are ready first
        return step

    steps = 4 * workers
    assert list(prefetch(make, 0, steps, workers)) == list(range(steps))
    assert len(threads) == workers
    assert prefetch_threads() == []


def test_an_error_of_one_of_several_threads_comes_in_its_turn():
    def make(step):
        if step == 3:
            raise SprintError("p3.png")  # long before step 2 is ready
        time.sleep(0.02)
        return step

    got = []
    with pytest.raises(SprintError, match=r"^p3.png$"):
        for step in prefetch(make, 0, 100, workers=4):
            got.append(step)
    assert got == [0, 1, 2]
    assert prefetch_threads() == []
