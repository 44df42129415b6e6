from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostcacher.errors import ConfigurationError
from ghostcacher.keys import Namespace, PrefixChain, common_tokens, pack_tokens, unpack_tokens

NAMESPACE = Namespace.of({"weights": "abc", "config": {"b": 1, "a": [1.5, None, "é"]}, "salt": None})
SCRIPT = """
from ghostcacher.keys import Namespace, PrefixChain
n = Namespace.of({"salt": None, "config": {"a": [1.5, None, "\\u00e9"], "b": 1}, "weights": "abc"})
c = PrefixChain.of(list(range(40)), n, 16)
print(n.hex, c.block(0).digest.hex(), c.block(1).digest.hex(), c.tail(40).digest.hex())
"""
GOLDEN = (
    "be3400bbdec3db067cce193b253ff8d984c8ac850cb833842ee7e7cc6112d785",
    "d0c11ef252a9b4a51719add3b80ff088c62a959bba96245bc8075eee9625f390",
    "d19118824c0c8630fcc39a9cf5c0b69b05ed9434e1c14034087afaab2b799909",
    "7c80ef9bf140f8d84e87b921b79b26003e345a6770e2c39e245c775da7f5ab8f",
)


def keys_of_another_process(hash_seed):
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    return tuple(done.stdout.split())


@pytest.mark.parametrize("length", [0, 1, 2, 16, 17])
def test_one_token_of_a_prompt_never_comes_from_a_store(length):
    chain = PrefixChain.of(list(range(length)), Namespace(bytes(32)), 16)
    assert chain.reusable_tokens == max(0, length - 1)


def test_golden_values():
    chain = PrefixChain.of(list(range(40)), NAMESPACE, 16)
    found = (NAMESPACE.hex, *(key.digest.hex() for key in (chain.block(0), chain.block(1), chain.tail(40))))
    assert found == GOLDEN


@pytest.mark.parametrize("hash_seed", [0, 1, 4711])
def test_f66_equal_across_processes_and_hash_seeds(hash_seed):
    assert keys_of_another_process(hash_seed) == GOLDEN


def test_the_formula_by_hand():
    import hashlib
    import struct

    key = PrefixChain.of([5, 6, 7], NAMESPACE, 16).tail(3)
    data = b"ghostcacher/block/1\0" + NAMESPACE.digest + struct.pack("<I3i", 3, 5, 6, 7)
    assert key.digest == hashlib.sha256(data).digest()
    assert key.is_genuine()
    assert key.store_key == f"{NAMESPACE.hex}/{key.digest.hex()}"


def test_a_key_depends_on_everything_before_it():
    one = PrefixChain.of([1, 2, 3, 4] * 8, NAMESPACE, 16)
    two = PrefixChain.of([9, 2, 3, 4] + [1, 2, 3, 4] * 7, NAMESPACE, 16)
    assert one.block(1).tokens == two.block(1).tokens
    assert one.block(1).digest != two.block(1).digest
    other = PrefixChain.of([1, 2, 3, 4] * 8, Namespace.of({"salt": "x"}), 16)
    assert one.block(0).digest != other.block(0).digest


@given(st.lists(st.integers(0, 2**31 - 1), max_size=80), st.lists(st.integers(0, 2**31 - 1), max_size=40))
def test_extending_is_the_same_as_beginning_with_all(first, more):
    grown = PrefixChain.of(first, NAMESPACE, 16).extended(more)
    whole = PrefixChain.of(first + more, NAMESPACE, 16)
    assert list(grown.covering(0, len(grown))) == list(whole.covering(0, len(whole)))


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40))
def test_common_tokens_is_the_common_prefix(left, right):
    naive = next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    assert common_tokens(pack_tokens(left), pack_tokens(right)) == naive


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=80), st.sampled_from([16, 20, 64]))
def test_blocks_cover_every_token_once(ids, block_tokens):
    chain = PrefixChain.of(ids, NAMESPACE, block_tokens)
    keys = list(chain.covering(0, len(chain)))
    assert [token for key in keys for token in unpack_tokens(key.tokens)] == ids
    assert all(key.is_genuine() for key in keys)
    assert chain.reusable_tokens == len(ids) - 1


@pytest.mark.parametrize("ids", [[-1], [2**31], [2**40]])
def test_impossible_tokens_are_refused(ids):
    with pytest.raises(ConfigurationError, match="2147483647"):
        PrefixChain.of(ids, NAMESPACE, 16)


def test_a_namespace_is_json():
    with pytest.raises(ConfigurationError, match="JSON"):
        Namespace.of({"weights": object()})
