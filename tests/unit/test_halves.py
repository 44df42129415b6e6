"""Which half of a cluster is read after reads that hang: no server is asked here."""

from __future__ import annotations

import time

from ghostcacher.stores.halves import Halves, asks_others


class ClusterDownError(Exception):
    pass


def test_masters_are_read_until_a_read_of_them_is_overdue():
    halves = Halves()
    with halves.reading(10.0) as hanging, halves.reading(10.0) as other:
        assert (hanging, other) == (False, False)
    with halves.reading(0.02), halves.reading(0.02):
        time.sleep(0.03)
        with halves.reading(10.0) as after:
            assert after, "two reads hang, and the other half is read"
        with halves.reading(10.0) as later:
            assert later, "they are counted once"
    with halves.reading(10.0) as finished:
        assert finished


def test_a_late_answer_of_the_half_that_was_left_changes_nothing():
    halves = Halves()
    with halves.reading(0.01), halves.reading(0.03):
        time.sleep(0.02)
        with halves.reading(10.0) as after:
            assert after
        time.sleep(0.02)
        with halves.reading(10.0) as later:
            assert later, "the second one hung too, and hung there"


def test_replicas_that_hang_are_left_as_masters_are():
    halves = Halves()
    halves.are_replicas = True
    with halves.reading(0.0) as hanging:
        time.sleep(0.01)
        with halves.reading(10.0) as after:
            assert (hanging, after) == (True, False)


def test_others_are_asked_in_time_and_of_what_only_some_would_say():
    soon, past = time.monotonic() + 10.0, time.monotonic() - 1.0
    assert asks_others([ConnectionError()], soon)
    assert not asks_others([], soon)
    assert not asks_others([ConnectionError()], past)
    assert not asks_others([ConnectionError(), ClusterDownError()], soon)


def test_a_cluster_without_replicas_is_not_asked_for_them_at_every_read():
    halves = Halves()
    assert [halves.asks_for_names() for _ in range(3)] == [True, False, False]
