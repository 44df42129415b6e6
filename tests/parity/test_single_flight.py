"""Two stores on one directory are given the same prefix at once: it is computed once."""

from __future__ import annotations

import threading
import time

import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.testing.models import random_prompt, tiny_model

SHARED = random_prompt(200, seed=8)


def prompt(seed):
    return torch.cat([SHARED, random_prompt(10, seed=seed)], dim=1)


def opened(folder, **given):
    return ghostcacher.open_store(folder, memory=None, block_tokens=16, **given)


def run_both(generate, folder, **given):
    """Reports and tokens of two stores; the second begins when the first has claimed its prefix."""
    begun, results = threading.Event(), {}

    def run(name, store, model, ids):
        cache = GhostCache(model, store)
        results[name] = (generate(model, ids, cache, new=3), cache.report)

    models = [tiny_model("llama"), tiny_model("llama")]
    with opened(folder, **given) as one, opened(folder, **given) as two:
        claim = one._flights.wait

        def claim_and_linger(*arguments):
            claim(*arguments)
            begun.set()
            time.sleep(0.3)

        one._flights.wait = claim_and_linger
        first = threading.Thread(target=run, args=("first", one, models[0], prompt(1)))
        first.start()
        begun.wait(10)
        run("second", two, models[1], prompt(2))
        first.join()
        one.flush()
        assert not one._flights._held, "what is stored is claimed no longer; closing would give it up too"
    for name, seed in (("first", 1), ("second", 2)):
        assert torch.equal(results[name][0], generate(models[1], prompt(seed), new=3))
    return results["first"][1], results["second"][1]


def test_the_second_waits_and_finds_what_the_first_computed(tmp_path, generate):
    first, second = run_both(generate, tmp_path / "d", single_flight=30.0)
    assert first.cached_tokens == 0
    assert second.cached_tokens == 200
    left = [path for path in (tmp_path / "d" / "v1").rglob("*.safetensors") if path.stat().st_size < 100]
    assert left == []


def test_sealed_claims_too(tmp_path, generate):
    assert run_both(generate, tmp_path / "d", single_flight=30.0, key=b"k" * 32)[1].cached_tokens == 200


def test_what_runs_cold_in_the_end_gives_its_claim_up(tmp_path, generate, models, monkeypatch):
    model = models("llama")
    with opened(tmp_path / "d", single_flight=30.0) as store:
        monkeypatch.setattr(store, "submit", lambda *_, **__: False)
        generate(model, SHARED, GhostCache(model, store), new=1)
        assert len(list(store.shelf._stores[0].list_keys(timeout_seconds=1.0))) == 1
    with opened(tmp_path / "d", single_flight=0.2) as store:
        assert list(store.shelf._stores[0].list_keys(timeout_seconds=1.0)) == []


def test_looking_up_claims_nothing(tmp_path, models):
    with opened(tmp_path / "d", single_flight=30.0) as store:
        ghostcacher.lookup(models("llama"), SHARED[0].tolist(), store)
        assert list(store.shelf._stores[0].list_keys(timeout_seconds=1.0)) == []
