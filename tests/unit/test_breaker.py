"""A store that keeps failing is left alone, probed, and taken back."""

from __future__ import annotations

import threading
import time

import pytest

from ghostcacher.errors import StoreError, StoreRefusedError
from ghostcacher.stores.memory import MemoryStore
from ghostcacher.testing.faulty import FaultyStore
from ghostcacher.testing.store import key
from ghostcacher.tiers.breaker import FAILURES, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, BreakerStore

DOWN = frozenset({"get_many", "put_many", "contains_many", "delete_many", "list_keys"})


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def faulty():
    return FaultyStore(MemoryStore())


@pytest.fixture
def breaker(faulty, clock):
    return BreakerStore(faulty, clock)


def ask(breaker):
    return breaker.contains_many([key(1)], timeout_seconds=1.0)


def fail(breaker, times):
    for _ in range(times):
        with pytest.raises(StoreError):
            ask(breaker)


def test_it_opens_after_three_failures_in_a_row_and_asks_nobody_then(breaker, faulty):
    faulty.failing = DOWN
    fail(breaker, FAILURES - 1)
    faulty.failing = frozenset()
    ask(breaker)
    faulty.failing = DOWN
    fail(breaker, FAILURES)
    calls = len(faulty.calls)
    began = time.perf_counter()
    fail(breaker, 100)
    assert (time.perf_counter() - began) / 100 < 1e-3
    assert len(faulty.calls) == calls
    assert breaker.is_out


@pytest.mark.parametrize("method", sorted(DOWN))
def test_every_call_counts_and_is_refused(method, breaker, faulty):
    arguments = {
        "get_many": ([key(1)],), "put_many": ({key(1): [b"x"]},), "contains_many": ([key(1)],),
        "delete_many": ([key(1)],), "list_keys": ("",),
    }[method]  # fmt: skip
    limit = {"limit_bytes": 1} if method == "get_many" else {}
    faulty.failing = DOWN
    for _ in range(FAILURES + 1):
        with pytest.raises(StoreError):
            getattr(breaker, method)(*arguments, timeout_seconds=1.0, **limit)
    assert len(faulty.calls) == FAILURES


def test_a_value_that_cannot_be_read_is_a_failure(breaker, faulty, monkeypatch):
    monkeypatch.setattr(faulty, "get_many", lambda keys, **_: {name: StoreError("torn") for name in keys})
    for _ in range(FAILURES):
        breaker.get_many([key(1)], limit_bytes=1, timeout_seconds=1.0)
    assert breaker.is_out


def test_pauses_double_up_to_a_limit_and_one_success_ends_them(breaker, faulty, clock):
    faulty.failing = DOWN
    fail(breaker, FAILURES)
    pause, waited = FIRST_PAUSE_SECONDS, []
    for _ in range(9):
        clock.now += pause - 0.01
        calls = len(faulty.calls)
        fail(breaker, 1)
        assert len(faulty.calls) == calls
        clock.now += 0.02
        fail(breaker, 1)
        assert len(faulty.calls) == calls + 1
        waited.append(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    assert waited[-1] == LONGEST_PAUSE_SECONDS
    clock.now += LONGEST_PAUSE_SECONDS
    faulty.failing = frozenset()
    assert ask(breaker) == frozenset()
    assert not breaker.is_out
    faulty.failing = DOWN
    fail(breaker, FAILURES - 1)
    assert not breaker.is_out


def test_only_one_call_probes_at_a_time(breaker, faulty, clock):
    faulty.failing = DOWN
    fail(breaker, FAILURES)
    clock.now += FIRST_PAUSE_SECONDS
    faulty.delay_seconds = 0.2
    calls, raised = len(faulty.calls), []

    def probe():
        try:
            ask(breaker)
        except StoreError as error:
            raised.append(error)

    probing = threading.Thread(target=probe)
    probing.start()
    time.sleep(0.05)
    fail(breaker, 1)
    probing.join()
    assert len(raised) == 1
    assert len(faulty.calls) == calls + 1


def test_calls_that_fail_together_are_one_outage(breaker, faulty, clock):
    faulty.failing, faulty.delay_seconds = DOWN, 0.2
    threads = [threading.Thread(target=fail, args=(breaker, 1)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.now += FIRST_PAUSE_SECONDS
    assert not breaker.is_out


def test_a_store_that_says_no_has_not_failed(breaker, faulty, monkeypatch):
    def refuse(*_, **__):
        raise StoreRefusedError("full")

    monkeypatch.setattr(faulty, "put_many", refuse)
    for _ in range(2 * FAILURES):
        with pytest.raises(StoreRefusedError):
            breaker.put_many({key(1): [b"x"]}, timeout_seconds=1.0)
    assert not breaker.is_out
    ask(breaker)


def test_whatever_a_client_raises_is_a_failure(breaker, faulty, monkeypatch):
    monkeypatch.setattr(faulty, "contains_many", lambda *_, **__: 1 / 0)
    for _ in range(FAILURES):
        with pytest.raises(ZeroDivisionError):
            ask(breaker)
    assert breaker.is_out


def test_a_store_that_takes_nothing_still_gives(breaker, faulty):
    faulty.failing = frozenset({"put_many", "delete_many"})
    for _ in range(FAILURES):
        with pytest.raises(StoreError):
            breaker.put_many({key(1): [b"x"]}, timeout_seconds=1.0)
    calls = len(faulty.calls)
    with pytest.raises(StoreError):
        breaker.delete_many([key(1)], timeout_seconds=1.0)
    assert len(faulty.calls) == calls
    assert ask(breaker) == frozenset()
    assert not breaker.is_out


def test_a_call_about_nothing_says_nothing(breaker, faulty, clock):
    faulty.failing = DOWN
    fail(breaker, FAILURES)
    clock.now += FIRST_PAUSE_SECONDS
    assert breaker.contains_many([], timeout_seconds=1.0) == frozenset()
    calls = len(faulty.calls)
    fail(breaker, 2)
    assert len(faulty.calls) == calls + 1
