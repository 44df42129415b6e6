from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from ghostcacher.eviction import LeastRecentlyUsed
from ghostcacher.index import PrefixIndex
from ghostcacher.keys import Namespace, PrefixChain

NAMESPACE = Namespace(bytes(32))
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=8)


def chain(ids):
    return PrefixChain.of(ids, NAMESPACE, 4)


def covered(found):
    return found[-1].key.start + found[-1].tokens if found else 0


def naive_longest(stored, prompt):
    shared = 0
    for other in stored:
        same = next(
            (n for n, (a, b) in enumerate(zip(other, prompt, strict=False)) if a != b), min(len(other), len(prompt))
        )
        shared = max(shared, same)
    return min(shared, len(prompt) - 1)


@settings(max_examples=300)
@given(PROMPTS, st.lists(st.integers(0, 2), min_size=1, max_size=14))
def test_longest_match_equals_comparing_with_every_stored_prompt(stored, prompt):
    index = PrefixIndex()
    for ids in stored:
        for key in chain(ids).covering(0, len(ids)):
            for outgrown in index.add(key, 1):
                index.remove(outgrown.digest)
    assert covered(index.longest(chain(prompt))) == naive_longest(stored, prompt)


@settings(max_examples=200)
@given(PROMPTS, st.data())
def test_counts_hold_whatever_is_added_and_removed(stored, data):
    index = PrefixIndex()
    for ids in stored:
        for key in chain(ids).covering(0, len(ids)):
            index.add(key, 3)
    for entry in data.draw(st.lists(st.sampled_from(index.entries()), max_size=6)):
        index.remove(entry.key.digest)
    entries = index.entries()
    assert index.size_bytes == 3 * len(entries) == 3 * len(index)
    held = Counter(entry.key.namespace for entry in entries)
    assert {name: index.namespace_bytes(name) for name in held} == {name: 3 * count for name, count in held.items()}
    for entry in entries:
        assert entry.children == sum(other.key.parent == entry.key.digest for other in entries)


def test_the_most_recent_use_survives_and_parents_outlive_children():
    now = [100.0]
    index = PrefixIndex(clock=lambda: now[0])
    for first in range(3):
        for key in chain([first] * 8).covering(0, 8):
            index.add(key, 10)
        now[0] += 1
    index.touch(key.digest for key in chain([0] * 8).covering(0, 8))
    order = [entry.key for entry in index.victims(60, LeastRecentlyUsed())]
    assert [(key.tokens[0], key.start) for key in order] == [(1, 4), (1, 0), (2, 4), (2, 0), (0, 4), (0, 0)]


def test_lossy_blocks_are_invisible_to_an_exact_reader():
    index = PrefixIndex()
    keys = list(chain([1] * 8).covering(0, 8))
    index.add(keys[0], 1)
    index.add(keys[1], 1, lossy=True)
    asked = chain([1] * 9)
    assert covered(index.longest(asked)) == 8
    assert covered(index.longest(asked, exact_only=True)) == 4


def test_a_block_that_is_noted_again_while_it_is_read_stays_pinned():
    index = PrefixIndex()
    (key,) = chain([1, 2, 3, 4]).covering(0, 4)
    index.add(key, 1)
    with index.pinned([key.digest]):
        index.add(key, 2, lossy=True)
        assert list(index.victims(1, LeastRecentlyUsed())) == []
        entry = index.get(key.digest)
        assert (entry.size_bytes, entry.lossy, index.size_bytes) == (2, True, 2)
    assert [entry.key for entry in index.victims(1, LeastRecentlyUsed())] == [key]


def test_what_was_only_named_is_learned_once_and_stays_as_recent_as_it_was():
    index = PrefixIndex(clock=lambda: 5.0)
    snapshot = chain([1, 2, 3, 4]).snapshot(4)
    for key in (*chain([1, 2, 3, 4]).covering(0, 4), snapshot):
        index.add(key, 0, used_at_seconds=1.0)
        index.learn(key.digest, 30, lossy=True, codec="int8", kl=0.5)
        index.learn(key.digest, 70, lossy=False, codec="raw", kl=None)
        entry = index.get(key.digest)
        assert (entry.size_bytes, entry.lossy, entry.codec, entry.kl) == (30, True, "int8", 0.5)
        assert entry.used_at_seconds == 1.0
    index.learn(bytes(32), 9, lossy=False, codec="raw", kl=None)
    assert (len(index), index.size_bytes, index.snapshot_bytes()) == (2, 60, 30)
    assert index.namespace_bytes(snapshot.namespace) == 60
    index.remove(snapshot.digest)
    assert (index.size_bytes, index.snapshot_bytes(), index.namespace_bytes(snapshot.namespace)) == (30, 0, 30)
