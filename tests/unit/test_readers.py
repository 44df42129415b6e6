"""Several threads over some items: each item once, at once where threads are idle, never waiting for each other."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ghostcacher.tiers.readers import Readers

TIMEOUT_SECONDS = 20.0


@pytest.fixture
def readers(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    made = Readers(3)
    yield made
    made.close()


def met(parties):
    """What ends only when it runs on so many threads at once."""
    barrier = threading.Barrier(parties)
    return lambda _: barrier.wait(TIMEOUT_SECONDS)


def running():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ghostcacher-reader")]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_every_item_is_taken_once(readers, count):
    taken = []
    readers(taken.append, range(count))
    assert sorted(taken) == list(range(count))


def test_the_caller_and_all_others_work_at_once(readers):
    readers(met(3), range(3))
    assert len(running()) == 2


def test_one_item_needs_no_thread(readers):
    names = []
    readers(lambda _: names.append(threading.current_thread()), [1])
    assert names == [threading.current_thread()]
    assert not running()


def test_one_processor_is_one_thread(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    names = set()
    Readers()(lambda _: names.add(threading.current_thread()), range(5))
    assert names == {threading.current_thread()}


def test_calls_within_calls_all_end(readers):
    taken = []

    def split(depth, path=()):
        if depth == 0:
            taken.append(path)
            return
        readers(lambda number: split(depth - 1, (*path, number)), range(4))

    split(4)
    assert len(set(taken)) == len(taken) == 4**4


def test_idle_threads_help_in_a_call_within(readers):
    """Two items for three threads: the third is soon there for what one of them gives out."""
    helped, deadline = set(), time.monotonic() + TIMEOUT_SECONDS

    def help_out(_):
        helped.add(threading.current_thread())
        time.sleep(0.01)

    def give_out(number):
        while number and len(helped) < 2 and time.monotonic() < deadline:
            readers(help_out, range(6))

    readers(give_out, range(2))
    assert len(helped) >= 2


def test_several_callers_share_the_threads(readers):
    taken, lock = [], threading.Lock()

    def take(item):
        with lock:
            taken.append(item)

    callers = [threading.Thread(target=readers, args=(take, range(n * 100, n * 100 + 100))) for n in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(TIMEOUT_SECONDS)
    assert sorted(taken) == list(range(800))


def test_an_exception_is_raised_when_all_that_had_begun_have_ended(readers):
    both, ended = threading.Barrier(2), []

    def fail_or_end(item):
        if item > 1:
            ended.append(item)
            return
        both.wait(TIMEOUT_SECONDS)
        if item:
            raise ValueError(item)
        time.sleep(0.05)
        ended.append(item)

    slow = Readers(2)
    with pytest.raises(ValueError, match=r"^1$"):
        slow(fail_or_end, range(50))
    slow.close()
    assert ended[-1] == 0
    assert len(ended) < 49


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_exception_nothing_more_begins_and_the_threads_are_free(readers, error):
    begun = []

    def fail(item):
        begun.append(item)
        raise error(item)

    with pytest.raises(error):
        readers(fail, range(100))
    assert len(begun) <= 3
    readers(met(3), range(3))


def test_closed_readers_start_again(readers):
    readers(met(3), range(3))
    readers.close()
    assert not running()
    readers(met(3), range(3))


def test_without_threads_the_caller_does_it_all(readers, monkeypatch):
    """What a pool says that was closed a moment ago, and any pool while the interpreter ends."""

    def refuse(*_):
        raise RuntimeError("cannot schedule new futures after shutdown")

    names = set()
    with monkeypatch.context() as closing:
        closing.setattr(ThreadPoolExecutor, "submit", refuse)
        readers(lambda _: names.add(threading.current_thread()), range(5))
    assert names == {threading.current_thread()}
    readers(met(3), range(3))


def test_a_forked_child_has_threads_of_its_own(readers):
    readers(met(3), range(3))
    child = os.fork()
    if child == 0:
        readers(met(3), range(3))
        os._exit(0 if len(running()) == 2 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    readers(met(3), range(3))
