"""Deleting by content and by namespace, readers that change nothing, and what is seen once."""

from __future__ import annotations

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache, forget
from ghostcacher.errors import ConfigurationError, StoreError
from ghostcacher.testing.faulty import FaultyStore
from ghostcacher.testing.models import random_prompt, tiny_model
from ghostcacher.testing.words import word_tokenizer, words_of

SYSTEM = random_prompt(128, seed=1)
SECRET = torch.cat([SYSTEM, random_prompt(100, seed=2)], dim=1)
OTHER = torch.cat([SYSTEM, random_prompt(100, seed=3)], dim=1)


def known(model, prompt, store):
    return ghostcacher.lookup(model, prompt[0].tolist(), store).tokens


def files(tmp_path):
    return {path.name: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}


def is_written(prompt, tmp_path):
    """Whether any file holds the ids of the second half."""
    ids = ",".join(map(str, prompt[0, 128:192].tolist())).encode()
    return any(ids in data for data in files(tmp_path).values())


@pytest.fixture
def filled(llama, generate, tmp_path):
    far = f"file://{tmp_path}/far"
    with ghostcacher.open_store(tmp_path / "near", memory="16MiB", block_tokens=64, remote=far) as store:
        for prompt in (SECRET, OTHER):
            generate(llama, prompt, GhostCache(llama, store), new=20)
        store.flush()
        yield store


def test_a_prompt_and_its_answers_are_forgotten_in_every_tier_and_the_shared_part_stays(
    llama, filled, generate, tmp_path
):
    longer = torch.cat([SECRET, random_prompt(64, seed=4)], dim=1)
    generate(llama, longer, GhostCache(llama, filled), new=1)
    filled.flush()
    assert forget(llama, SECRET[0].tolist(), filled, keep_tokens=128) >= 3
    assert known(llama, longer, filled) == 128
    assert known(llama, OTHER, filled) >= 227
    given = {"memory": None, "block_tokens": 64, "remote": f"file://{tmp_path}/far"}
    for elsewhere in ({"disk": None, **given}, {**given, "remote": None}):
        with ghostcacher.open_store(tmp_path / "near", **elsewhere) as fresh:
            assert known(llama, longer, fresh) == 128
            assert known(llama, OTHER, fresh) >= 192
    secret = SECRET[0, 128:192].tolist()
    assert not any(str(secret)[1:-1].replace(" ", "").encode() in data for data in files(tmp_path).values())
    assert any(
        str(OTHER[0, 128:192].tolist())[1:-1].replace(" ", "").encode() in data for data in files(tmp_path).values()
    )


def test_without_a_part_to_keep_everything_that_begins_so_goes(llama, filled, tmp_path):
    forget(llama, SYSTEM[0].tolist(), filled)
    assert known(llama, OTHER, filled) == 0
    assert files(tmp_path) == {}


def test_a_text_is_forgotten_by_what_the_tokenizer_makes_of_it(llama, filled):
    text, tokenizer = words_of(SECRET), word_tokenizer()
    with pytest.raises(ConfigurationError, match="tokenizer="):
        forget(llama, text, filled)
    assert forget(llama, text, filled, keep_tokens=128, tokenizer=word_tokenizer(begins=True)) == 0
    assert known(llama, SECRET, filled) == 227
    assert forget(llama, text, filled, keep_tokens=128, tokenizer=tokenizer) == 2
    assert known(llama, SECRET, filled) == 128


def test_what_another_process_stored_is_found_by_its_content(llama, filled, generate, tmp_path):
    with ghostcacher.open_store(tmp_path / "near", memory=None, block_tokens=64) as other:
        forget(llama, SECRET[0].tolist(), other, keep_tokens=128)
    with ghostcacher.open_store(tmp_path / "near", memory=None, block_tokens=64) as other:
        assert known(llama, SECRET, other) == 128


def test_snapshots_are_forgotten_too(generate, tmp_path):
    model = tiny_model("qwen3_next")
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64) as store:
        generate(model, SECRET, GhostCache(model, store), new=1)
        store.flush()
        assert store.stats().tiers[0].snapshots > 0
        forget(model, SECRET[0].tolist(), store)
    assert files(tmp_path) == {}


def test_a_namespace_is_purged_and_no_other(llama, filled, generate, tmp_path):
    stranger = tiny_model("llama", seed=9)
    generate(stranger, SECRET, GhostCache(stranger, filled), new=1)
    filled.flush()
    namespace = next(entry.key.namespace for entry in filled.tiers[0].index.entries())
    mine = namespace if known(llama, OTHER, filled) else b""
    removed = filled.purge(mine)
    assert removed > 0
    left = [known(model, OTHER if model is llama else SECRET, filled) for model in (llama, stranger)]
    assert sorted(tokens == 0 for tokens in left) == [False, True]


def test_a_store_that_does_not_delete_says_so(llama, filled):
    filled.tiers[1].store = FaultyStore(filled.tiers[1].store, failing=frozenset({"delete_many"}))
    with pytest.raises(StoreError):
        forget(llama, SECRET[0].tolist(), filled)


def test_there_is_nothing_to_forget_of_a_model_that_is_not_served(filled):
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigurationError, match="as it stands now"):
        forget(model, [1, 2, 3], filled)


def test_a_reader_takes_what_is_there_and_changes_nothing(llama, filled, generate, tmp_path):
    filled.close()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    given = {"memory": "16MiB", "block_tokens": 64, "remote": f"file://{tmp_path}/far", "role": "reader"}
    with ghostcacher.open_store(tmp_path / "near", **given) as reader:
        for prompt in (SECRET, random_prompt(200, seed=7), SECRET):
            cache = GhostCache(llama, reader)
            assert torch.equal(generate(llama, prompt, cache), generate(llama, prompt))
            reader.flush()
        assert cache.report.cached_tokens == 227
        assert [tier.stored > 0 for tier in reader.stats().tiers] == [True, False, False]
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_a_reader_does_not_delete_what_it_cannot_read(llama, filled, generate, tmp_path):
    filled.close()
    damaged = next((tmp_path / "near").rglob("*.safetensors"))
    damaged.write_bytes(b"damaged")
    with ghostcacher.open_store(tmp_path / "near", memory=None, block_tokens=64, role="reader") as reader:
        generate(llama, SECRET, GhostCache(llama, reader))
        assert reader.stats().tiers[0].rejected == 1
    assert damaged.read_bytes() == b"damaged"


def test_second_sight_stores_far_away_what_comes_twice(llama, generate, tmp_path):
    with ghostcacher.open_store(tmp_path, memory="16MiB", block_tokens=64, admit="second-sight") as store:
        for seen, prompt in enumerate([SECRET, OTHER, OTHER]):
            generate(llama, prompt, GhostCache(llama, store), new=1)
            store.flush()
            # The beginning that both share comes twice with the second prompt.
            assert store.stats().tiers[1].blocks == [0, 2, 4][seen]
        assert store.stats().tiers[0].blocks >= 6
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64) as other:
        assert known(llama, OTHER, other) == 227
        assert known(llama, SECRET, other) == 128


def test_f76_a_flood_of_one_namespace_evicts_its_own(llama, generate, tmp_path, record_property):
    """Tenants share a budget: B's prompts never cost A a block, however many there are."""
    shared = {"directory": tmp_path, "memory": None, "block_tokens": 64, "namespace_quota": "900KiB"}
    with ghostcacher.open_store(**shared, salt="a") as a, ghostcacher.open_store(**shared, salt="b") as b:
        generate(llama, SECRET, GhostCache(llama, a), new=1)
        a.flush()
        for seed in range(20):
            generate(llama, random_prompt(200, seed=seed), GhostCache(llama, b), new=1)
            b.flush()
            held = sum(
                entry.size_bytes for entry in b.tiers[0].index.entries() if entry.key.namespace != namespace_of(a)
            )
            assert held <= 900 * 1024
        assert known(llama, SECRET, a) == 227
        assert known(llama, random_prompt(200, seed=19), b) >= 128
        assert b.stats().tiers[0].evicted > 0
        assert a.stats().tiers[0].evicted == 0
    record_property("trials", 20)


def namespace_of(store):
    return next(entry.key.namespace for entry in store.tiers[0].index.entries())


@pytest.mark.parametrize("given", [{"role": "owner"}, {"admit": "never"}])
def test_roles_and_admissions_that_do_not_exist(given, tmp_path):
    with pytest.raises(ConfigurationError, match="choose one of"):
        ghostcacher.open_store(tmp_path, **given)
