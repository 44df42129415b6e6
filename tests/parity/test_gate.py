"""Never longer than computing would take: what is too slow to load is computed, and the report says so."""

from __future__ import annotations

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.gate import LEAST_WAIT_SECONDS, Line
from ghostcacher.hooks import hooks_of
from ghostcacher.testing.faulty import FaultyStore
from ghostcacher.testing.models import random_prompt, tiny_model

PROMPT = random_prompt(200, seed=4)
SLOW = "miss: slower to load than to compute"


@pytest.fixture
def model():
    """A model of its own, in this process never measured before."""
    return tiny_model("llama")


@pytest.fixture
def filled(model, generate, tmp_path):
    """A store whose disk holds the prompt, and a model whose prefill takes 1 ms a token."""
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
        store.flush()
        hooks_of(model).adapter.prefill.add(200, 0.2)
        yield store


def asked(model, store, generate, prompt=PROMPT):
    cache = GhostCache(model, store)
    assert torch.equal(generate(model, prompt, cache), generate(model, prompt))
    return cache.report


def test_a_tier_slower_than_computing_is_left_alone_until_it_is_tried_again(model, filled, generate, monkeypatch):
    [disk] = filled.tiers
    state_bytes = 199 * hooks_of(model).adapter.shape.layout.token_bytes()
    disk.loading.add(state_bytes, 9.0)
    hits = disk.stats().hits
    report = asked(model, filled, generate)
    assert (report.cached_tokens, report.reason) == (0, SLOW)
    assert disk.stats().hits == hits
    monkeypatch.setattr("ghostcacher.tiers.stack.RETRY_SECONDS", 0.0)
    assert asked(model, filled, generate).cached_tokens == 199


def test_a_fast_tier_is_used(model, filled, generate):
    filled.tiers[0].loading.add(1000, 1e-4)
    assert asked(model, filled, generate).cached_tokens == 199


def test_only_the_near_part_is_loaded_if_the_far_one_does_not_pay(model, generate, tmp_path):
    near, far = PROMPT[:, :130], f"file://{tmp_path}/far"
    with ghostcacher.open_store(memory="1MiB", disk=None, block_tokens=64, remote=far) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
    with ghostcacher.open_store(memory="1MiB", disk=None, block_tokens=64, remote=far) as store:
        generate(model, near, GhostCache(model, store), new=1)
        store.flush()
        hooks_of(model).adapter.prefill.add(200, 0.2)
        store.tiers[1].loading.add(1000, 9.0)
        report = asked(model, store, generate)
        assert (report.tier, report.cached_tokens) == ("memory", 128)
        assert report.reason == "hit"


@pytest.mark.parametrize("recipe", ["qwen3_next", "lfm2"])
def test_state_that_is_valid_at_one_length_is_loaded_whole_or_not_at_all(recipe, generate, tmp_path):
    model = tiny_model(recipe)
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
        store.flush()
        hooks_of(model).adapter.prefill.add(200, 0.2)
        store.tiers[0].loading.add(1000, 9.0)
        assert asked(model, store, generate).reason == SLOW
        store.tiers[0].loading = Line()
        assert asked(model, store, generate).cached_tokens >= 192


def test_a_batch_loads_its_rows_one_after_the_other(model, filled, generate):
    rows = torch.cat([PROMPT, random_prompt(200, seed=9)])
    generate(model, rows, GhostCache(model, filled), new=1)
    filled.flush()
    line = filled.tiers[0].loading = Line()
    line.add(3 * 199 * hooks_of(model).adapter.shape.layout.token_bytes(), 1.05)
    assert asked(model, filled, generate).cached_tokens == 199 if line.seconds(1) is None else True
    # 0.35 s for each row: less than its 0.2 s a row and 0.05 s of grace do not cover.
    assert asked(model, filled, generate, rows).reason == SLOW


def test_prefills_are_measured_by_the_step_that_follows_them(model, generate, tmp_path):
    prefill = None
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64) as store:
        for new in (1, 2):
            generate(model, PROMPT, GhostCache(model, store), new=new)
            prefill = hooks_of(model).adapter.prefill.seconds(200)
            assert (prefill is None) == (new == 1)
    assert 0 < prefill < 60


def test_no_tier_is_waited_for_longer_than_computing_takes(model, filled, generate):
    hooks_of(model).adapter.prefill = Line()
    hooks_of(model).adapter.prefill.add(200, 2.0)
    [disk], waited = filled.tiers, []

    class Spy(FaultyStore):
        def get_many(self, keys, *, limit_bytes, timeout_seconds):
            waited.append(timeout_seconds)
            return super().get_many(keys, limit_bytes=limit_bytes, timeout_seconds=timeout_seconds)

    disk._store = Spy(disk._store)
    asked(model, filled, generate)
    assert waited == [pytest.approx(2.0)] * 4
    hooks_of(model).adapter.prefill = Line()
    hooks_of(model).adapter.prefill.add(200, 1e-3)
    waited.clear()
    disk.loading.add(1000, 1e-4)
    asked(model, filled, generate)
    assert set(waited) == {LEAST_WAIT_SECONDS}


def test_what_fails_takes_its_time_too(model, filled, generate):
    """A server that answers late and then not at all must not be asked for every prompt."""
    [disk] = filled.tiers
    disk.loading = Line()
    disk._store = FaultyStore(disk._store, failing=frozenset({"get_many"}), delay_seconds=0.3)
    assert asked(model, filled, generate).reason == "miss: first seen"
    calls = len(disk._store.calls)
    assert asked(model, filled, generate).reason == SLOW
    assert disk._store.calls[calls:].count("get_many") == 0


def test_lookup_says_what_is_known_and_loads_nothing(model, filled, generate):
    ids = PROMPT[0].tolist()
    found = ghostcacher.lookup(model, ids, filled)
    assert (found.prompt_tokens, found.tokens, found.tier) == (200, 199, "disk")
    assert found.load_seconds is None
    assert found.compute_seconds == pytest.approx(0.2)
    assert filled.stats().tiers[0].hits == 0
    asked(model, filled, generate)
    assert ghostcacher.lookup(model, ids, filled).load_seconds > 0
    assert ghostcacher.lookup(model, ids[:70] + [1] * 20, filled).tokens == 70
    assert ghostcacher.lookup(model, [5, 6, 7], filled).tokens == 0
    assert ghostcacher.lookup(model, [], filled).tokens == 0


def test_lookup_of_models_that_are_not_served(generate, tmp_path):
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with ghostcacher.open_store(tmp_path, memory=None) as store:
        assert ghostcacher.lookup(model, PROMPT[0].tolist(), store).tokens == 0
