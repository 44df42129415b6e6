"""Single flight: of several processes that are given the same unseen prefix, one computes it and the others wait."""

from __future__ import annotations

import secrets
import threading
import time

from ghostcacher.errors import StoreError
from ghostcacher.keys import FLIGHTS, BlockKey, PrefixChain
from ghostcacher.stores.base import Store

FIRST_PAUSE_SECONDS = 0.01
LONGEST_PAUSE_SECONDS = 0.1
OWNER_BYTES = 16


class Flights:
    """Claims on blocks that are being computed: a value under a name of its own in the ``store`` that all share.

    A claim goes when what it was made for is stored, or with its store. One that stands for ``wait_seconds`` belongs to
    a process that is gone or too slow: who waited for it removes it and goes on. A store that fails claims nothing.
    """

    def __init__(self, store: Store, wait_seconds: float, timeout_seconds: float) -> None:
        self._store = store
        self._wait_seconds = wait_seconds
        self._timeout_seconds = timeout_seconds
        self._owner = secrets.token_bytes(OWNER_BYTES)
        self._held: dict[bytes, BlockKey] = {}
        self._lock = threading.Lock()

    def wait(self, chain: PrefixChain, known_tokens: int) -> bool:
        """Claim the first whole block of ``chain`` after ``known_tokens``, or wait for who did; whether it waited."""
        index = known_tokens // chain.block_tokens
        if index >= chain.reusable_tokens // chain.block_tokens:
            return False
        key = chain.block(index)
        try:
            owner = self._claim(key)
            if owner is None:
                return False
            self._await(key, owner)
        except StoreError:
            return False
        return True

    def land(self, chain: PrefixChain) -> None:
        """Give up the claims on blocks of ``chain``: it is stored, or will not be."""
        with self._lock:
            landed = [key for key in self._held.values() if _holds(chain, key)]
        self._release(landed)

    def close(self) -> None:
        """Give up every claim."""
        self._release(list(self._held.values()))

    def _claim(self, key: BlockKey) -> bytes | None:
        """None if it is ours now, else who has it."""
        with self._lock:
            if key.digest in self._held:
                return self._owner
            self._held[key.digest] = key  # also if the answer is late: what may stand is given up with the rest
        name = _name(key)
        stood = self._store.put_many({name: [self._owner]}, timeout_seconds=self._timeout_seconds, replace=False)
        owner = self._owner_of(name) if stood else self._owner
        if owner == self._owner:
            return None
        with self._lock:
            self._held.pop(key.digest, None)
        return owner

    def _await(self, key: BlockKey, owner: bytes) -> None:
        name, deadline, pause_seconds = _name(key), time.monotonic() + self._wait_seconds, FIRST_PAUSE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(pause_seconds, max(0.0, deadline - time.monotonic())))
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
            if self._owner_of(name) != owner:
                return
        self._store.delete_many([name], timeout_seconds=self._timeout_seconds)
        with self._lock:
            self._held.pop(key.digest, None)

    def _owner_of(self, name: str) -> bytes:
        found = self._store.get_many([name], limit_bytes=OWNER_BYTES, timeout_seconds=self._timeout_seconds).get(name)
        if isinstance(found, StoreError):
            raise found
        return b"" if found is None else bytes(found)

    def _release(self, keys: list[BlockKey]) -> None:
        if not keys:
            return
        with self._lock:
            for key in keys:
                self._held.pop(key.digest, None)
        try:
            self._store.delete_many([_name(key) for key in keys], timeout_seconds=self._timeout_seconds)
        except StoreError:
            return  # those who wait give up in time, and remove it


def _holds(chain: PrefixChain, key: BlockKey) -> bool:
    index = key.start // chain.block_tokens
    return index < chain.whole_blocks and chain.block(index).digest == key.digest


def _name(key: BlockKey) -> str:
    return f"{FLIGHTS.hex}/{key.digest.hex()}"
