"""Rows of the catalogue about who a block is for and where it comes from; the number in a name is the row's."""

from __future__ import annotations

import re
import shutil
import sys

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.codecs.header import header_bytes
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.codecs.safetensors_format import CodecChain, decode_blob
from ghostcacher.errors import BlockError, ConfigurationError
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.stores.filesystem import FilesystemStore
from ghostcacher.testing.models import random_prompt, tiny_model
from ghostcacher.testing.tier import LAYOUT, blocks_of, chain_of
from ghostcacher.testing.words import word_tokenizer, words_of

PROMPT = random_prompt(100, seed=3)


def opened(folder, **given):
    return ghostcacher.open_store(folder, **{"memory": None, "block_tokens": 16, **given})


def run(generate, model, store, prompt=PROMPT, new=3):
    cache = GhostCache(model, store)
    out = generate(model, prompt, cache, new=new)
    store.flush()
    return out, cache.report


def asked(generate, model, store, prompt=PROMPT):
    """How many tokens were reused, with the cold run's answer."""
    out, report = run(generate, model, store, prompt)
    assert torch.equal(out, generate(model, prompt, new=3))
    return report.cached_tokens


@pytest.mark.parametrize(("part", "reason"), [("length", "header"), ("values", "corrupt")])
def test_f14_what_a_big_endian_machine_would_write_is_refused(part, reason):
    block = blocks_of(chain_of(16))[0]
    blob = bytearray(b"".join(bytes(part) for part in CodecChain(RawCodec()).encode(block)))
    decode_blob(blob, block.key, LAYOUT)
    at = slice(8) if part == "length" else slice(header_bytes(blob), None)
    blob[at] = np.frombuffer(blob[at], "<u8" if part == "length" else "<u4").byteswap().tobytes()
    with pytest.raises(BlockError) as caught:
        decode_blob(blob, block.key, LAYOUT)
    assert caught.value.reason == reason


def test_f14_a_big_endian_machine_opens_no_store(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(ConfigurationError, match="big-endian"):
        opened(tmp_path / "d")


def test_f16_tokenizers_are_of_no_account_but_for_the_ids_they_give(models, generate, tmp_path):
    model, text = models("llama"), words_of(PROMPT)
    plain, renamed = word_tokenizer(), word_tokenizer(eos_token="<end>", additional_special_tokens=["<tool>"])
    opening = word_tokenizer(begins=True)
    same, other = (each(text, return_tensors="pt")["input_ids"] for each in (renamed, opening))
    with opened(tmp_path / "d") as store:
        assert asked(generate, model, store, plain(text, return_tensors="pt")["input_ids"]) == 0
        assert asked(generate, model, store, same) == 99
        assert other.shape[1] == 101
        assert asked(generate, model, store, other) == 0
        assert asked(generate, model, store, other) == 100


LIMIT = 32
ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": LIMIT},
    "longrope": {
        "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": LIMIT,
    },
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": LIMIT,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}  # fmt: skip
DEPEND_ON_LENGTH = {"dynamic", "longrope"}


def with_rope(rope_type):
    longest = LIMIT if rope_type == "dynamic" else 4 * LIMIT
    given = {"rope_type": rope_type, "rope_theta": 10_000.0, **ROPES[rope_type]}
    return tiny_model("llama", rope_parameters=given, max_position_embeddings=longest)


@pytest.mark.parametrize("rope_type", ["default", *ROPE_INIT_FUNCTIONS])
def test_f17_every_type_of_rope_stored_short_and_asked_long(rope_type, with_logits, tmp_path):
    """A type that this transformers added fails here, until it is known whether its keys depend on what follows."""
    model, twin = with_rope(rope_type), with_rope(rope_type)
    short, long = PROMPT[:, : LIMIT - 4], PROMPT[:, : 2 * LIMIT]
    with opened(tmp_path / "d") as store:
        for prompt in (short, long, short):
            cache = GhostCache(model, store)
            found, expected = with_logits(model, prompt, cache, new=1), with_logits(twin, prompt, new=1)
            assert torch.equal(found[0], expected[0])
            torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=0)
            if prompt is long:
                assert cache.report.cached_tokens == (0 if rope_type in DEPEND_ON_LENGTH else LIMIT - 4)
            store.flush()


STORES = """
import sys, torch, ghostcacher
from ghostcacher import GhostCache
from ghostcacher.testing.models import random_prompt, tiny_model
torch.set_num_threads(1)
model, ids = tiny_model("llama"), random_prompt(100, seed=3)
with ghostcacher.open_store(sys.argv[1], memory=None, block_tokens=16, salt="node") as store:
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=GhostCache(model, store), max_new_tokens=1)
"""
NODES = {
    "alike": ({}, 99), "block size": ({"block_tokens": 32}, 0), "salt": ({"salt": "nodes"}, 0),
    "no salt": ({"salt": None}, 0), "codec": ({"codec": "raw.z"}, 99), "lossy codec": ({"codec": "int8"}, 99),
    "budget": ({"disk": "1GiB"}, 99),
}  # fmt: skip


def test_f23_nodes_of_other_settings_share_what_is_the_same(models, generate, tmp_path, in_another_process):
    """Another process stored; each node here differs from it in one setting."""
    done = in_another_process(STORES, tmp_path / "d")
    assert done.returncode == 0, done.stderr
    model = models("llama")
    found = {}
    for name, (options, _) in NODES.items():
        with opened(tmp_path / "d", **{"salt": "node", "role": "reader", **options}) as store:
            found[name] = asked(generate, model, store)
    assert found == {name: tokens for name, (_, tokens) in NODES.items()}
    with opened(tmp_path / "d", salt="node") as store:
        assert asked(generate, tiny_model("llama", dtype=torch.bfloat16), store) == 0
        assert asked(generate, tiny_model("llama", attn_implementation="eager"), store) == 0


KEY, NEW = b"k" * 32, b"n" * 32


def blobs(folder):
    return {file: file.read_bytes() for file in folder.rglob("*.safetensors")}


def put_back(old):
    for file, blob in old.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(blob)


@pytest.mark.parametrize("key", [None, KEY])
def test_f73_an_old_block_put_back_is_what_it_was(key, models, generate, tmp_path):
    model = models("llama")
    with opened(tmp_path / "d", key=key) as store:
        assert asked(generate, model, store) == 0
        old = blobs(tmp_path / "d")
        assert ghostcacher.forget(model, PROMPT[0].tolist(), store) == len(old) > 0
        assert blobs(tmp_path / "d") == {}
    put_back(old)
    with opened(tmp_path / "d", key=key) as store:
        assert asked(generate, model, store) == 99


def test_f73_what_a_key_sealed_that_is_no_longer_in_the_ring_is_a_miss(models, generate, tmp_path):
    model = models("llama")
    with opened(tmp_path / "d", key=KEY) as store:
        asked(generate, model, store)
        old = blobs(tmp_path / "d")
        ghostcacher.forget(model, PROMPT[0].tolist(), store)
    put_back(old)
    with opened(tmp_path / "d", key=NEW) as store:
        assert asked(generate, model, store) == 0
        assert asked(generate, model, store) == 99
    assert old.items() <= blobs(tmp_path / "d").items()


class Watch:
    """Every call that reaches a kind of store: its name, how many keys it names, how much comes back."""

    def __init__(self, monkeypatch, *kinds):
        self.calls = []
        for kind in kinds:
            for name in ("get_many", "put_many", "contains_many", "delete_many", "list_keys"):
                monkeypatch.setattr(kind, name, self._watched(name, getattr(kind, name)))

    def _watched(self, name, method):
        def call(store, keys="", **given):
            back = method(store, keys, **given)
            back = list(back) if name == "list_keys" else back
            values = back.values() if isinstance(back, dict) else [b""] * len(back or ())
            self.calls.append((store.name, name, 0 if isinstance(keys, str) else len(keys), sum(map(len, values))))
            return iter(back) if name == "list_keys" else back

        return call

    def since(self):
        seen, self.calls = self.calls, []
        return seen


@pytest.mark.parametrize("has_remote", [False, True])
def test_f75_a_tenant_cannot_tell_what_another_one_stored(has_remote, models, generate, tmp_path, monkeypatch):
    """What could be timed are calls to stores: for a prompt known to another, the same as for one known to nobody."""
    model, watch = models("llama"), Watch(monkeypatch, DirectoryStore, FilesystemStore)

    def calls(folder, salt, prompt):
        with opened(folder / "d", salt=salt, remote=f"file://{folder}/r" if has_remote else None) as store:
            watch.since()
            reused = asked(generate, model, store, prompt)
            store.flush()  # a cache that is let go of leaves its answer to the writer
            # Sorted: in which order a directory lists its files is the file system's, and differs between copies.
            return reused, sorted(watch.since())

    calls(tmp_path / "filled", "a", PROMPT)
    for twin in ("known", "unknown"):
        shutil.copytree(tmp_path / "filled", tmp_path / twin)
    known = calls(tmp_path / "known", "b", PROMPT)
    unknown = calls(tmp_path / "unknown", "b", random_prompt(100, seed=4))
    assert known == unknown
    assert known[0] == 0
    assert len(known[1]) > 1
    own = calls(tmp_path / "filled", "a", PROMPT)
    assert own[0] == 99
    assert own[1] != known[1], "inside a salt hits differ, by design"


WITHOUT_EXTRAS = """
import sys
for name in ("redis", "s3fs", "obstore", "cryptography", "numba", "ray", "mooncake", "zstandard", "backports.zstd",
             "compression.zstd", "bitsandbytes", "peft", "gguf", "optimum", "hqq"):
    sys.modules[name] = None
import torch, ghostcacher
from ghostcacher import GhostCache
from ghostcacher.testing.models import random_prompt, tiny_model
torch.set_num_threads(1)
model, ids = tiny_model("llama"), random_prompt(100, seed=3)
for turn in range(3):
    given = {"memory": None if turn else "64MiB", "codec": "int8" if turn > 1 else "raw"}
    with ghostcacher.open_store(sys.argv[1], **given) as store:
        cache = GhostCache(model, store)
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=1)
        print(cache.report.cached_tokens)
for given in ({"codec": "raw.z"}, {"codec": "ec(1.0)"}, {"codec": "bnb_nf4"}, {"remote": "redis://127.0.0.1"},
              {"remote": "s3://bucket"}, {"remote": "mooncake://127.0.0.1:50051"}, {"key": b"k" * 32}):
    try:
        ghostcacher.open_store(sys.argv[1] + "x", **given)
    except ghostcacher.MissingExtraError as error:
        print(str(error).partition("pip install ")[2][:28])
    else:
        print("opened", given)
"""


def test_f80_without_any_extra_the_core_works_and_the_others_say_what_to_install(tmp_path, in_another_process):
    done = in_another_process(WITHOUT_EXTRAS, tmp_path / "d")
    assert done.returncode == 0, done.stderr
    reused, said = done.stdout.split()[:3], done.stdout.splitlines()[3:]
    assert reused == ["0", "99", "99"]
    extras = [re.search(r"ghostcacher\[([a-z0-9]+)\]", line) for line in said]
    assert [found and found[1] for found in extras] == ["zstd", "zstd", "bnb", "redis", "s3", "mooncake", "seal"], said
