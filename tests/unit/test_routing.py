"""Who should take a prompt."""

from __future__ import annotations

import json

from ghostcacher.integrations.routing import ReplicaState, prefix_hashes, ranked, text_of

TEXT = "".join(f"{number} " for number in range(600))
HASHES = prefix_hashes(TEXT)


def holding(steps, service=1.0, fetch=0.0):
    return ReplicaState(frozenset(HASHES[:steps]), service, fetch)


def test_equal_beginnings_have_equal_hashes_and_no_others():
    other = TEXT[:1024] + "x" + TEXT[1025:]
    assert len(HASHES) == len(TEXT) // 256
    assert prefix_hashes(other)[:4] == HASHES[:4]
    assert not set(prefix_hashes(other)[4:]) & set(HASHES)
    assert prefix_hashes(TEXT[:255]) == []


def test_the_idlest_takes_it_where_a_fetch_costs_nothing():
    assert ranked(TEXT, [holding(8), holding(0)], [1, 0]) == [1, 0]


def test_who_has_it_near_takes_it_where_nobody_waits():
    assert ranked(TEXT, [holding(0), holding(8), holding(3)], [0, 0, 0]) == [1, 2, 0]


def test_a_dear_fetch_is_worth_waiting_for():
    cheap, dear = [holding(8, fetch=0.01), holding(0, fetch=0.01)], [holding(8, fetch=0.1), holding(0, fetch=0.1)]
    assert ranked(TEXT, cheap, [1, 0]) == [1, 0]
    assert ranked(TEXT, dear, [1, 0]) == [0, 1]
    assert ranked(TEXT, dear, [3, 0]) == [1, 0]


def test_replicas_that_said_nothing_yet_are_taken_by_their_queues():
    assert ranked(TEXT, [ReplicaState()] * 3, [2, 0, 1]) == [1, 2, 0]
    assert ranked("", [], []) == []


def test_what_is_not_known_of_a_replica_is_taken_to_be_as_of_the_others():
    busy, new = ReplicaState(frozenset(), 10.0, 1.0), ReplicaState()
    assert ranked(TEXT, [busy, new], [1, 40]) == [0, 1]
    assert ranked(TEXT, [busy, new], [4, None]) == [0, 1]
    assert ranked(TEXT, [busy, new], [4, 3]) == [1, 0]


def test_whatever_a_replica_or_a_client_sends_is_taken():
    assert len(prefix_hashes("\ud83d" * 600)) == 2
    assert ReplicaState.parse({"near": None, "service_seconds": None}) == ReplicaState()


def test_a_hole_ends_what_is_near():
    state = ReplicaState(frozenset([HASHES[0], HASHES[2]]))
    assert state.near_steps(HASHES) == 1


def test_a_state_survives_being_sent():
    state = holding(3, service=0.25, fetch=0.5)
    assert ReplicaState.parse(json.loads(json.dumps(state.as_dict()))) == state
    assert ReplicaState.parse({}) == ReplicaState()


def test_the_prompt_of_a_call():
    assert text_of(["a prompt", 5]) == "a prompt"
    assert text_of([5, {"prompt": "in a mapping"}]) == "in a mapping"
    assert text_of([5, {"prompt": 6}, None]) == ""
