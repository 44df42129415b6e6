"""What every store must do."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from ghostcacher.errors import ConfigurationError
from ghostcacher.stores.base import Store

SECONDS = 30.0


def key(number: int, namespace: int = 0) -> str:
    """A well-formed store key."""
    return f"{namespace:064x}/{number:064x}"


class StoreContract:
    """Subclass it and give a fixture ``store`` that returns an empty store."""

    def read(self, store: Store, *keys: str, limit_bytes: int = 2**30) -> dict[str, bytes]:
        found = store.get_many(list(keys), limit_bytes=limit_bytes, timeout_seconds=SECONDS)
        return {
            name: bytes(value) for name, value in found.items() if isinstance(value, bytes | bytearray | memoryview)
        }

    def write(self, store: Store, **values: Sequence[bytes]) -> None:
        store.put_many({key(int(name[1:])): parts for name, parts in values.items()}, timeout_seconds=SECONDS)

    def test_what_was_put_is_got(self, store: Store) -> None:
        self.write(store, k1=[b"head", b"", b"body"], k2=[b"x" * 100_000])
        assert self.read(store, key(1), key(2)) == {key(1): b"headbody", key(2): b"x" * 100_000}

    def test_absent_keys_are_left_out(self, store: Store) -> None:
        self.write(store, k1=[b"one"])
        assert self.read(store, key(1), key(9)) == {key(1): b"one"}
        assert self.read(store, key(9)) == {}
        assert self.read(store) == {}

    def test_no_more_than_the_limit_is_read(self, store: Store) -> None:
        self.write(store, k1=[b"0123456789"])
        assert self.read(store, key(1), limit_bytes=4) == {key(1): b"0123"}
        assert self.read(store, key(1), limit_bytes=10) == {key(1): b"0123456789"}
        assert self.read(store, key(1), limit_bytes=11) == {key(1): b"0123456789"}

    def test_a_second_put_replaces_the_first(self, store: Store) -> None:
        self.write(store, k1=[b"first, and longer"])
        self.write(store, k1=[b"second"])
        assert self.read(store, key(1)) == {key(1): b"second"}

    def test_without_replacing_what_stands_stays_and_is_named(self, store: Store) -> None:
        self.write(store, k1=[b"first"])
        items = {key(1): [b"second"], key(2): [b"new"]}
        stood = store.put_many(items, timeout_seconds=SECONDS, replace=False)
        assert stood == frozenset({key(1)})
        assert self.read(store, key(1), key(2)) == {key(1): b"first", key(2): b"new"}
        assert store.put_many(items, timeout_seconds=SECONDS) == frozenset()
        assert self.read(store, key(1)) == {key(1): b"second"}

    def test_of_several_writers_at_once_exactly_one_is_first(self, store: Store) -> None:
        for number in range(10):
            stood: list[frozenset[str]] = []
            start = threading.Barrier(3)

            def write(value: bytes, number: int = number, start: threading.Barrier = start) -> None:
                start.wait()
                made = store.put_many({key(number): [value]}, timeout_seconds=SECONDS, replace=False)
                stood.append(made)  # noqa: B023 (joined within the turn)

            writers = [threading.Thread(target=write, args=(letter * 2_000,)) for letter in (b"a", b"b", b"c")]
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.join()
            assert sorted(len(made) for made in stood) == [0, 1, 1]
            assert self.read(store, key(number))[key(number)] in {b"a" * 2_000, b"b" * 2_000, b"c" * 2_000}

    def test_what_was_got_does_not_change_with_the_store(self, store: Store) -> None:
        self.write(store, k1=[b"before"])
        held = store.get_many([key(1)], limit_bytes=100, timeout_seconds=SECONDS)[key(1)]
        self.write(store, k1=[b"after!"])
        assert isinstance(held, bytes | bytearray | memoryview)
        assert bytes(held) == b"before"

    def test_contains(self, store: Store) -> None:
        self.write(store, k1=[b"one"], k2=[b"two"])
        found = store.contains_many([key(1), key(2), key(3)], timeout_seconds=SECONDS)
        assert found == frozenset({key(1), key(2)})
        assert store.contains_many([], timeout_seconds=SECONDS) == frozenset()

    def test_delete_and_delete_again(self, store: Store) -> None:
        self.write(store, k1=[b"one"], k2=[b"two"])
        store.delete_many([key(1), key(7)], timeout_seconds=SECONDS)
        store.delete_many([key(1)], timeout_seconds=SECONDS)
        assert self.read(store, key(1), key(2)) == {key(2): b"two"}

    def test_list_by_prefix_with_sizes(self, store: Store) -> None:
        assert list(store.list_keys(timeout_seconds=SECONDS)) == []
        store.put_many({key(1, 10): [b"one"], key(2, 10): [b"four"], key(1, 11): [b"x"]}, timeout_seconds=SECONDS)
        listed = {entry.key: entry.size_bytes for entry in store.list_keys(f"{10:064x}/", timeout_seconds=SECONDS)}
        assert listed == {key(1, 10): 3, key(2, 10): 4}
        assert len(list(store.list_keys(timeout_seconds=SECONDS))) == 3

    @pytest.mark.parametrize("name", ["", "a", "../../etc/passwd", f"{0:064x}", f"{0:064x}/..", f"{0:064X}/{10:064X}"])
    def test_anything_but_a_key_is_refused(self, store: Store, name: str) -> None:
        with pytest.raises(ConfigurationError):
            store.get_many([name], limit_bytes=1, timeout_seconds=SECONDS)
        with pytest.raises(ConfigurationError):
            store.put_many({name: [b"x"]}, timeout_seconds=SECONDS)

    def test_a_reader_never_sees_half_a_value(self, store: Store) -> None:
        values = [bytes([letter]) * 50_000 for letter in b"ab"]
        store.put_many({key(1): [values[0]]}, timeout_seconds=SECONDS)

        def write() -> None:
            for turn in range(20):
                store.put_many({key(1): [values[turn % 2]]}, timeout_seconds=SECONDS)

        writer = threading.Thread(target=write)
        writer.start()
        while writer.is_alive():
            assert self.read(store, key(1)).get(key(1)) in values
        writer.join()
