"""Single flight: who claims, who waits, and that nobody waits for ever."""

from __future__ import annotations

import threading
import time

import pytest

import ghostcacher
from ghostcacher.errors import ConfigurationError, StoreTimeoutError
from ghostcacher.keys import FLIGHTS
from ghostcacher.stores.memory import MemoryStore
from ghostcacher.testing.faulty import FaultyStore
from ghostcacher.testing.tier import chain_of
from ghostcacher.tiers.flights import Flights

CHAIN = chain_of(64)


def flights(store, wait_seconds=5.0):
    return Flights(store, wait_seconds, 1.0)


def claims(store):
    return [entry.key for entry in store.list_keys(timeout_seconds=1.0)]


def test_the_first_claims_and_the_second_waits_until_it_has_landed():
    store = MemoryStore()
    first, second = flights(store), flights(store)
    assert not first.wait(CHAIN, 0)
    assert [key.partition("/")[0] for key in claims(store)] == [FLIGHTS.hex]
    waited = []
    waiting = threading.Thread(target=lambda: waited.append(second.wait(CHAIN, 0)))
    waiting.start()
    time.sleep(0.1)
    assert waited == []
    first.land(chain_of(80))
    waiting.join(5)
    assert waited == [True]
    assert claims(store) == []


def test_prompts_that_part_later_wait_for_what_they_share():
    store = MemoryStore()
    assert not flights(store).wait(CHAIN, 0)
    assert flights(store, 0.05).wait(chain_of(32), 0)
    assert not flights(store, 0.05).wait(CHAIN, 32)
    assert not flights(store, 0.05).wait(chain_of(32, first=500), 0)


def test_who_computes_less_than_a_block_claims_nothing():
    store = MemoryStore()
    assert not flights(store).wait(CHAIN, 60)
    assert not flights(store).wait(chain_of(16), 0)
    assert claims(store) == []


def test_a_dead_process_costs_one_wait_and_no_more():
    store = MemoryStore()
    assert not flights(store).wait(CHAIN, 0)
    survivor = flights(store, 0.2)
    began = time.monotonic()
    assert survivor.wait(CHAIN, 0)
    assert 0.2 <= time.monotonic() - began < 2
    assert claims(store) == []
    assert not survivor.wait(CHAIN, 0)


def test_threads_of_one_process_wait_for_each_other():
    store = MemoryStore()
    own = flights(store, 0.2)
    assert not own.wait(CHAIN, 0)
    assert own.wait(CHAIN, 0)
    assert claims(store) == []  # nobody waits twice for one that takes too long
    own.land(CHAIN)
    assert not own.wait(CHAIN, 0)


def test_a_claim_whose_answer_was_lost_is_given_up_with_the_rest():
    store = MemoryStore()

    class Late(MemoryStore):
        def put_many(self, items, *, timeout_seconds, replace=True):
            store.put_many(items, timeout_seconds=timeout_seconds, replace=replace)
            raise StoreTimeoutError("late")

    late = Late()
    late._values = store._values
    own = flights(late, 0.1)
    assert not own.wait(CHAIN, 0)
    assert len(claims(store)) == 1
    own.land(CHAIN)
    assert claims(store) == []


def test_closing_gives_up_every_claim():
    store = MemoryStore()
    own = flights(store)
    own.wait(CHAIN, 0)
    own.wait(chain_of(64, first=500), 0)
    assert len(claims(store)) == 2
    own.close()
    assert claims(store) == []


@pytest.mark.parametrize("failing", ["put_many", "get_many", "delete_many"])
def test_a_store_that_fails_claims_nothing_and_keeps_nobody(failing):
    backing = MemoryStore()
    if failing != "put_many":
        flights(backing).wait(CHAIN, 0)
    store = FaultyStore(backing, failing=frozenset({failing}))
    began = time.monotonic()
    flights(store, 0.1).wait(CHAIN, 0)
    flights(store, 0.1).close()
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), 601])
def test_a_wait_that_means_nothing_is_refused(seconds, tmp_path):
    with pytest.raises(ConfigurationError, match="single_flight"):
        ghostcacher.open_store(tmp_path, single_flight=seconds)
