"""What every eviction policy must do."""

from __future__ import annotations

from ghostcacher.eviction import EvictionPolicy
from ghostcacher.index import PrefixIndex
from ghostcacher.testing.tier import chain_of


class PolicyContract:
    """Subclass it and give a fixture ``policy``."""

    def test_it_gives_a_comparable_worth_and_changes_nothing(self, policy: EvictionPolicy) -> None:
        index = PrefixIndex()
        index.add(chain_of(16).block(0), 10)
        entry = index.entries()[0]
        before = repr(entry)
        assert policy(entry) <= policy(entry)
        assert repr(entry) == before

    def test_children_go_before_their_parents(self, policy: EvictionPolicy) -> None:
        index = PrefixIndex()
        keys = list(chain_of(80).covering(0, 80))
        for key in keys:
            index.add(key, 10)
        gone = [entry.key.start for entry in index.victims(50, policy)]
        assert gone == [64, 48, 32, 16, 0]

    def test_no_more_is_given_up_than_needed(self, policy: EvictionPolicy) -> None:
        index = PrefixIndex()
        for key in chain_of(80).covering(0, 80):
            index.add(key, 10)
        assert len(list(index.victims(15, policy))) == 2
        assert list(index.victims(0, policy)) == []

    def test_what_is_being_read_stays(self, policy: EvictionPolicy) -> None:
        index = PrefixIndex()
        keys = list(chain_of(32).covering(0, 32))
        for key in keys:
            index.add(key, 10)
        with index.pinned([keys[1].digest]):
            assert list(index.victims(20, policy)) == []
        assert len(list(index.victims(20, policy))) == 2
