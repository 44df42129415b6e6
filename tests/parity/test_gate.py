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


def line(amount, seconds):
    made = Line()
    made.add(amount, seconds)
    return made


def asked(model, store, generate, prompt=PROMPT):
    cache = GhostCache(model, store)
    assert torch.equal(generate(model, prompt, cache), generate(model, prompt))
    return cache.report


def test_f41_a_tier_slower_than_computing_is_left_alone_until_it_is_tried_again(model, filled, generate, monkeypatch):
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
    filled.tiers[0].loading.add(10**7, 1e-2)
    assert asked(model, filled, generate).cached_tokens == 199


def test_only_the_near_part_is_loaded_if_the_far_one_does_not_pay(model, generate, tmp_path):
    near, far = PROMPT[:, :130], f"file://{tmp_path}/far"
    with ghostcacher.open_store(memory="1MiB", disk=None, block_tokens=64, remote=far) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
    with ghostcacher.open_store(memory="1MiB", disk=None, block_tokens=64, remote=far) as store:
        generate(model, near, GhostCache(model, store), new=1)
        store.flush()
        hooks_of(model).adapter.prefill.add(200, 0.2)
        store.tiers[1].loading.add(10**7, 90.0)
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
        store.tiers[0].loading.add(10**7, 90.0)
        assert asked(model, store, generate).reason == SLOW
        store.tiers[0].loading = Line()
        assert asked(model, store, generate).cached_tokens >= 192


def test_what_rows_have_in_common_is_paid_for_once(model, filled, generate):
    other = torch.cat([PROMPT[:, :128], random_prompt(72, seed=9)], dim=1)
    rows = torch.cat([PROMPT, other])
    generate(model, rows, GhostCache(model, filled), new=1)
    filled.flush()
    [disk], token_bytes = filled.tiers, hooks_of(model).adapter.shape.layout.token_bytes()
    hooks_of(model).adapter.prefill = line(400, 0.4)
    # 272 tokens once; row by row, as if nothing were shared, they would be 398.
    disk.loading = line(272 * token_bytes, 0.40)
    assert asked(model, filled, generate, rows).cached_tokens >= 192
    hooks_of(model).adapter.prefill = line(400, 0.4)
    disk.loading = line(272 * token_bytes, 0.47)
    assert asked(model, filled, generate, rows).reason == SLOW


def test_prefills_are_measured_by_the_step_that_follows_them(model, generate, tmp_path):
    prefill = None
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64) as store:
        for new in (1, 2):
            generate(model, random_prompt(200, seed=new), GhostCache(model, store), new=new)
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

    disk.store = Spy(disk.store)
    asked(model, filled, generate)
    assert waited == [pytest.approx(2.0)] * 4
    hooks_of(model).adapter.prefill = Line()
    hooks_of(model).adapter.prefill.add(200, 1e-3)
    waited.clear()
    disk.loading = Line()
    asked(model, filled, generate)
    assert set(waited) == {LEAST_WAIT_SECONDS}


def test_f41_a_store_that_does_not_answer_in_time_is_not_asked_for_every_prompt(model, filled, generate, monkeypatch):
    monkeypatch.setattr("ghostcacher.serving.LEAST_WAIT_SECONDS", 0.2)
    [disk] = filled.tiers
    disk.loading = Line()
    disk.store = FaultyStore(disk.store, failing=frozenset({"get_many"}), delay_seconds=0.15)
    assert asked(model, filled, generate).reason == "miss: first seen"
    calls = len(disk.store.calls)
    assert disk.store.calls.count("get_many") == 4  # what took its time is not tried twice for one prompt
    for _ in range(3):
        assert asked(model, filled, generate).reason == SLOW
    assert disk.store.calls[calls:].count("get_many") == 0


def test_failures_at_once_do_not_make_a_tier_look_fast(model, filled, generate):
    [disk], token_bytes = filled.tiers, hooks_of(model).adapter.shape.layout.token_bytes()
    disk.loading = line(199 * token_bytes, 0.1)
    disk.store = FaultyStore(disk.store, failing=frozenset({"get_many"}))
    for _ in range(3):
        assert asked(model, filled, generate).cached_tokens == 0
    assert disk.loading.seconds(199 * token_bytes) == pytest.approx(0.1)


def test_f41_a_remote_tier_that_is_slow_to_answer_whether_it_has_anything_is_not_asked(model, generate, tmp_path):
    with ghostcacher.open_store(memory="1MiB", disk=None, block_tokens=64, remote=f"file://{tmp_path}/far") as store:
        hooks_of(model).adapter.prefill = line(200, 0.2)
        far = store.tiers[1]
        far.store = far.catalog._store = FaultyStore(far.store)
        far.asking.add(1, 9.0)
        asked(model, store, generate)
        assert "contains_many" not in far.store.calls
        far.asking = line(1, 0.01)
        asked(model, store, generate, random_prompt(200, seed=8))
        assert "contains_many" in far.store.calls


def test_few_tokens_say_nothing_of_many(model, filled, generate):
    """A process that begins on a full store computes one token a prompt."""
    hooks_of(model).adapter.prefill = line(1, 0.03)
    assert hooks_of(model).adapter.prefill.seconds(200) is None
    filled.tiers[0].loading.add(10**7, 1e-2)
    assert asked(model, filled, generate).cached_tokens == 199


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
