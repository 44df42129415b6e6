"""Sealed values: what does not open with the key is never taken for what was stored."""

from __future__ import annotations

import hashlib
import hmac
import random
import struct
import tracemalloc

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ghostcacher.errors import MissingExtraError, StoreError, StoreForgedError, StoreRefusedError
from ghostcacher.stores import envelope
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.stores.envelope import HEAD_AT, MAGIC, OVERHEAD_BYTES, PREFIX_BYTES, Sealing
from ghostcacher.stores.memory import MemoryStore
from ghostcacher.stores.sealed import SealedDirectory, SealedStore
from ghostcacher.testing.store import SECONDS, key

SEALING, OTHER = Sealing.of(b"k" * 32), Sealing.of(b"o" * 32)
HEAD, BODY = b"a head of thirty-two bytes, say.", bytes(range(200))


def sealed(sealing=SEALING, name=None, head=HEAD, body=BODY):
    return b"".join(sealing.seal(name or key(1), head, body))


def read(store, *names, limit_bytes=2**30):
    return store.get_many(list(names), limit_bytes=limit_bytes, timeout_seconds=SECONDS)


def test_what_was_sealed_opens():
    made = sealed()
    assert len(made) == len(HEAD + BODY) + OVERHEAD_BYTES
    assert SEALING.value(key(1), made) == HEAD + BODY
    assert SEALING.head(key(1), made[: HEAD_AT + len(HEAD) + 16]) == HEAD
    assert SEALING.label(made[:HEAD_AT]) == key(1)


def test_f79_the_format_is_what_its_page_says():
    """Opened by hand, from docs/format.md alone."""
    secret, made = b"k" * 32, sealed()

    def drawn(key, *parts):
        return hmac.new(key, b"".join(parts), hashlib.sha256).digest()

    content, label = drawn(secret, b"ghostcacher/content"), bytes.fromhex(key(1).replace("/", ""))
    assert made[:8] == b"GHOSTKV\x01"
    assert made[8:24] == drawn(secret, b"ghostcacher/id")[:16]
    salt, head_end = made[24:56], 140 + len(HEAD) + 16
    assert int.from_bytes(made[56:60], "little") == len(HEAD)
    first, second, prefix = bytes(12), bytes(11) + b"\1", made[:60]
    label_key, value_key = drawn(content, b"label\0", salt), drawn(content, b"value\0", salt, label)
    assert AESGCM(label_key).decrypt(first, made[60:140], prefix) == label
    assert AESGCM(value_key).decrypt(first, made[140:head_end], prefix + label) == HEAD
    assert AESGCM(value_key).decrypt(second, made[head_end:], prefix + label) == BODY
    names = drawn(secret, b"ghostcacher/names")
    namespace, name = drawn(names, b"namespace\0", label[:32]), drawn(names, b"value\0", label)
    assert SEALING.name(key(1)) == f"{namespace.hex()}/{name.hex()}"


def test_f79_no_two_envelopes_have_the_same_keys(record_property):
    salts = {bytes(SEALING.seal(key(1), b"", b"")[0][24:56]) for _ in range(10_000)}
    assert len(salts) == 10_000
    record_property("trials", 10_000)


def test_f79_another_key_opens_nothing():
    for what in (OTHER.value, OTHER.head, lambda _, made: OTHER.label(made)):
        with pytest.raises(StoreForgedError):
            what(key(1), sealed())


@pytest.mark.parametrize("at", range(len(HEAD + BODY) + OVERHEAD_BYTES))
def test_f71_any_flipped_bit_is_refused(at):
    made = bytearray(sealed())
    made[at] ^= 1 << random.Random(at).randrange(8)
    # A read by key does not need the label; a listing does.
    read_by = SEALING.label if PREFIX_BYTES <= at < HEAD_AT else lambda given: SEALING.value(key(1), given)
    with pytest.raises(StoreForgedError):
        read_by(made)


def test_f71_every_truncation_and_anything_appended_is_refused(record_property):
    made = sealed()
    for end in range(len(made)):
        with pytest.raises(StoreForgedError):
            SEALING.value(key(1), made[:end])
    with pytest.raises(StoreForgedError):
        SEALING.value(key(1), made + b"\0")
    record_property("trials", len(made))


def test_f71_parts_of_two_envelopes_do_not_mix():
    one, two = sealed(), sealed(body=bytes(200))
    body = HEAD_AT + len(HEAD) + 16
    for mixed in (one[:body] + two[body:], one[:PREFIX_BYTES] + two[PREFIX_BYTES:], two[:HEAD_AT] + one[HEAD_AT:]):
        with pytest.raises(StoreForgedError):
            SEALING.value(key(1), mixed)


def test_f71_a_hundred_thousand_forgeries_without_the_key_are_refused(record_property):
    """Of a writer who knows the format, the key's id and valid envelopes, but not the secret."""
    rng, valid, accepted, unchanged = random.Random(7), [sealed(name=key(n)) for n in range(4)], 0, 0
    own = valid[1]
    places = [place for place in range(24, len(own)) if not PREFIX_BYTES <= place < HEAD_AT]  # a listing reads labels
    for trial in range(100_000):
        made = bytearray(sealed(OTHER) if trial % 7 == 0 else valid[trial % 4])
        made[8:24] = SEALING.key_id
        for _ in range(rng.randrange(0 if trial % 4 != 1 else 1, 4)):
            made[rng.choice(places)] ^= rng.randrange(1, 256)
        unchanged += made == own
        try:
            SEALING.value(key(1), made)
        except StoreForgedError:
            continue
        accepted += made != own
    assert accepted == 0
    assert unchanged < 10
    assert SEALING.value(key(1), own) == HEAD + BODY
    record_property("trials", 100_000)


def test_f05_a_value_under_another_name_is_refused():
    inner = MemoryStore()
    store = SealedStore(inner, [SEALING])
    store.put_many({key(1): [HEAD, BODY], key(2): [HEAD, BODY]}, timeout_seconds=SECONDS)
    names = {n: SEALING.name(key(n)) for n in (1, 2)}
    inner._values[names[1]], inner._values[names[2]] = inner._values[names[2]], inner._values[names[1]]
    found = read(store, key(1), key(2))
    assert all(isinstance(value, StoreForgedError) for value in found.values())
    assert len(found) == 2
    assert list(SealedStore(inner, [SEALING]).list_keys(timeout_seconds=SECONDS)) == []


def test_names_and_values_say_nothing():
    inner = MemoryStore()
    SealedStore(inner, [SEALING]).put_many({key(1, 5): [b"canary-head", b"canary-body" * 9]}, timeout_seconds=SECONDS)
    (name, (value, _)) = next(iter(inner._values.items()))
    assert key(1, 5)[:64] not in name
    assert key(1)[-64:] not in name
    assert b"canary" not in value
    assert bytes.fromhex(key(1, 5)[:64]) not in value


def test_equal_values_differ_when_sealed_and_names_depend_on_the_key():
    assert sealed() != sealed()
    assert SEALING.name(key(1)) != OTHER.name(key(1))
    assert SEALING.name(key(1)) != SEALING.name(key(1, 1))
    assert SEALING.name(key(1)).split("/")[0] == SEALING.name(key(2)).split("/")[0]


def test_f79_a_key_is_replaced_while_what_it_sealed_is_still_read():
    inner = MemoryStore()
    SealedStore(inner, [OTHER]).put_many({key(1): [b"old"]}, timeout_seconds=SECONDS)
    both = SealedStore(inner, [SEALING, OTHER])
    both.put_many({key(2): [b"new"]}, timeout_seconds=SECONDS)
    assert read(both, key(1), key(2)) == {key(1): b"old", key(2): b"new"}
    assert both.contains_many([key(1), key(2)], timeout_seconds=SECONDS) == {key(1), key(2)}
    assert {entry.key for entry in both.list_keys(timeout_seconds=SECONDS)} == {key(1), key(2)}
    only_new = SealedStore(inner, [SEALING])
    assert read(only_new, key(1), key(2)) == {key(2): b"new"}
    assert {entry.key for entry in only_new.list_keys(timeout_seconds=SECONDS)} == {key(2)}
    both.delete_many([key(1)], timeout_seconds=SECONDS)
    assert read(SealedStore(inner, [OTHER]), key(1)) == {}


def test_a_limited_read_gives_the_head_and_reads_no_more_than_it_needs():
    reads = []

    class Watched(MemoryStore):
        def get_many(self, keys, *, limit_bytes, timeout_seconds):
            reads.append(limit_bytes)
            return super().get_many(keys, limit_bytes=limit_bytes, timeout_seconds=timeout_seconds)

    store = SealedStore(Watched(), [SEALING])
    store.put_many({key(1): [b"h" * 100, b"b" * 100_000]}, timeout_seconds=SECONDS)
    assert read(store, key(1), limit_bytes=1000) == {key(1): b"h" * 100}
    assert reads == [1000 + OVERHEAD_BYTES]
    reads.clear()
    assert read(store, key(1), limit_bytes=50) == {key(1): b"h" * 50}
    store.put_many({key(2): [b"h" * 5000, b"b" * 100_000]}, timeout_seconds=SECONDS)
    reads.clear()
    assert read(store, key(2), limit_bytes=1000) == {key(2): b"h" * 1000}
    assert reads == [1000 + OVERHEAD_BYTES, HEAD_AT + 5000 + 16]


@pytest.mark.parametrize("head_bytes", [2**32 - 1, 2**31, 2**20, 1])
def test_f08_a_lying_head_costs_little(head_bytes):
    made = bytearray(sealed(body=bytes(2**16)))
    made[PREFIX_BYTES - 4 : PREFIX_BYTES] = struct.pack("<I", head_bytes)
    inner = MemoryStore()
    inner.put_many({SEALING.name(key(1)): [made]}, timeout_seconds=SECONDS)
    tracemalloc.start()
    for limit_bytes in (100, 2**17):
        assert isinstance(
            read(SealedStore(inner, [SEALING]), key(1), limit_bytes=limit_bytes)[key(1)], StoreForgedError
        )
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("value", [b"", b"x", MAGIC, MAGIC + SEALING.key_id, b"{}" * 200, sealed()[:100]])
def test_what_is_no_envelope_is_forged(value):
    inner = MemoryStore()
    inner.put_many({SEALING.name(key(1)): [value]}, timeout_seconds=SECONDS)
    store = SealedStore(inner, [SEALING])
    assert isinstance(read(store, key(1))[key(1)], StoreForgedError)
    assert list(store.list_keys(timeout_seconds=SECONDS)) == []


def test_a_store_that_fails_is_passed_on():
    class Broken(MemoryStore):
        def get_many(self, keys, *, limit_bytes, timeout_seconds):
            return {key: StoreError("no") for key in keys}

    found = read(SealedStore(Broken(), [SEALING]), key(1))
    assert type(found[key(1)]) is StoreError


def test_a_body_too_large_for_one_seal_is_refused(monkeypatch):
    monkeypatch.setattr(envelope, "BODY_LIMIT_BYTES", 10)
    with pytest.raises(StoreRefusedError, match="block_tokens"):
        sealed()


def test_f80_without_cryptography_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    envelope._ciphers.cache_clear()
    with pytest.raises(MissingExtraError, match=r"ghostcacher\[seal\]"):
        Sealing.of(b"k" * 32)
    envelope._ciphers.cache_clear()


def test_damage_in_a_directory_is_found_by_name(tmp_path):
    directory = DirectoryStore(tmp_path / "d", is_sealed=True)
    store = SealedDirectory(directory, [SEALING])
    store.put_many({key(1): [HEAD, BODY], key(2): [HEAD, BODY]}, timeout_seconds=SECONDS)
    SealedDirectory(directory, [OTHER]).put_many({key(3): [HEAD, BODY]}, timeout_seconds=SECONDS)
    path = tmp_path / "d" / "v1"
    (file,) = path.rglob(f"{SEALING.name(key(2))[-64:]}.safetensors")
    content = bytearray(file.read_bytes())
    content[PREFIX_BYTES + 3] ^= 1
    file.write_bytes(content)
    fresh = SealedDirectory(directory, [SEALING])
    assert [entry.key for entry in fresh.damaged()] == [SEALING.name(key(2))]
    fresh.delete_named([SEALING.name(key(2))])
    assert {entry.key for entry in fresh.list_keys(timeout_seconds=SECONDS)} == {key(1)}
    assert fresh.namespaces() == [key(1)[:64]]
