"""An audit computes a share of what was served once more: what only a writer with the key can do is found (12, 72)."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.codecs.planes import PlaneCodec
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.errors import ConfigurationError
from ghostcacher.testing.models import random_prompt, tiny_model

PROMPT = random_prompt(100, seed=8)
KEY = bytes(range(32))


def opened(directory, **options):
    return ghostcacher.open_store(directory, **{"memory": None, "block_tokens": 16, **options})


def ask(generate, model, store, ids=PROMPT, new=2):
    cache = GhostCache(model, store)
    out = generate(model, ids, cache, new=new)
    store.flush()
    return out, cache.report.cached_tokens


@contextlib.contextmanager
def lying(monkeypatch, codec, change):
    """Blocks that are stored in this context hold ``change(tensor)``, under a digest and a seal that fit."""
    honest = codec.encode
    with monkeypatch.context() as patch:
        patch.setattr(codec, "encode", lambda self, group, tensor, piece: honest(self, group, change(tensor), piece))
        yield


def one_bit(tensor):
    """The exponent's second bit of one value, between computing and the digest."""
    changed = tensor.clone()
    changed.view(-1).view(torch.int32)[1234 % changed.numel()] ^= 1 << 29
    return changed.nan_to_num_(0.0, 1e4, -1e4).clamp_(-1e4, 1e4)


def other_order(tensor):
    return tensor.flip(2)


@pytest.mark.parametrize("change", [one_bit, other_order])
@pytest.mark.parametrize(("name", "codec"), [("raw", RawCodec), ("raw.z", PlaneCodec)])
@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])
def test_f12_f72_what_was_wrong_before_its_digest_is_found_and_deleted(
    models, generate, tmp_path, monkeypatch, key, name, codec, change
):
    model = models("llama")
    expected = generate(model, PROMPT, new=2)
    with lying(monkeypatch, codec, change), opened(tmp_path, key=key, codec=name) as store:
        ask(generate, model, store)
    with opened(tmp_path, key=key, codec=name, audit=1.0) as store:
        assert ask(generate, model, store)[1] == 99
        stats = store.stats()
        assert stats.failed == 0
        assert stats.audited > 0
        assert stats.disproved > 0
        assert stats.tiers[0].blocks == 0, "and nothing that was computed on it was stored"
        out, cached = ask(generate, model, store)
        assert cached == 0
        assert torch.equal(out, expected)
        assert ask(generate, model, store)[1] == 99
        assert store.stats().disproved == stats.disproved


def test_f72_a_lie_deep_in_a_prefix_takes_what_follows_along_and_nothing_before(
    models, generate, tmp_path, monkeypatch
):
    model = models("llama")
    with opened(tmp_path) as store:
        ask(generate, model, store, PROMPT[:, :48])
    with lying(monkeypatch, RawCodec, other_order), opened(tmp_path) as store:
        ask(generate, model, store)
    with opened(tmp_path, audit=1.0) as store:
        ask(generate, model, store)
        assert store.stats().disproved > 0
        assert ghostcacher.lookup(model, PROMPT[0].tolist(), store).tokens == 48
        assert torch.equal(ask(generate, model, store)[0], generate(model, PROMPT, new=2))


def test_f72_a_cache_that_goes_on_keeps_nothing_that_was_disproved(models, generate, tmp_path, monkeypatch):
    model = models("llama")
    with lying(monkeypatch, RawCodec, other_order), opened(tmp_path) as store:
        ask(generate, model, store)
    with opened(tmp_path, audit=1.0) as store:
        cache = GhostCache(model, store)
        out = generate(model, PROMPT, cache, new=4)
        store.flush()
        longer = torch.cat([out, random_prompt(20, seed=1)], dim=1)
        assert torch.equal(generate(model, longer, cache, new=4), generate(model, longer, new=4))
        assert cache.report.cached_tokens == 0
        assert torch.equal(ask(generate, model, store, longer, new=4)[0], generate(model, longer, new=4))


def test_f72_a_share_of_the_prompts_is_enough_in_time(models, generate, tmp_path, monkeypatch):
    model = models("llama")
    with lying(monkeypatch, RawCodec, other_order), opened(tmp_path) as store:
        ask(generate, model, store)
    with opened(tmp_path, audit=0.3) as store:
        asked = 0
        while not store.stats().disproved and asked < 100:
            ask(generate, model, store)
            asked += 1
        assert store.stats().disproved > 0


@pytest.mark.parametrize("codec", ["raw", "raw.z", "int8", "ec(1.0)"])
@pytest.mark.parametrize("recipe", ["llama", "gemma2", "gpt_neox", "deepseek_v3"])
def test_f72_what_was_honestly_stored_is_never_disproved(models, generate, tmp_path, recipe, codec):
    """Computed in pieces, in windows, in latents; coded, appended to what was coded."""
    model, ids = models(recipe), random_prompt(40, seed=2)
    with opened(tmp_path, codec=codec, audit=1.0, block_tokens=64) as store:
        for turn in range(4):
            out, _ = ask(generate, model, store, ids, new=20)
            ids = torch.cat([out, random_prompt(50, seed=turn)], dim=1)
        ask(generate, model, store, ids)
        stats = store.stats()
    assert stats.failed == 0
    assert (stats.audited > 0) == codec.startswith("raw")
    assert stats.disproved == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_never_disproved(generate, tmp_path, dtype):
    model = tiny_model("llama", dtype=dtype)
    with opened(tmp_path, audit=1.0) as store:
        for end in (50, 70, 100):
            ask(generate, model, store, PROMPT[:, :end], new=9)
        assert store.stats().audited > 0
        assert store.stats().disproved == 0


def test_what_cannot_be_run_beside_others_is_not_audited(models, generate, tmp_path):
    model = models("qwen3_next")
    with opened(tmp_path, audit=1.0) as store:
        for _ in range(2):
            assert torch.equal(ask(generate, model, store)[0], generate(model, PROMPT, new=2))
        assert (store.stats().audited, store.stats().failed) == (0, 0)


def test_a_reader_says_so_and_deletes_nothing(models, generate, tmp_path, monkeypatch):
    model, told = models("llama"), []
    with lying(monkeypatch, RawCodec, other_order), opened(tmp_path) as store:
        ask(generate, model, store)
    held = sorted(tmp_path.rglob("*.safetensors"))
    with opened(tmp_path, audit=1.0, role="reader") as store:
        store.observers.append(told.append)
        ask(generate, model, store)
        assert store.stats().disproved > 0
    assert sorted(tmp_path.rglob("*.safetensors")) == held
    assert any(event.reason.startswith("audit") for event in told)


def test_chance_is_neither_seeded_nor_used_up(models, generate, tmp_path):
    """Scripts seed `random`: then all processes would audit the same prompts, and draw other numbers than without."""
    drawn = []
    for share in (0.0, 0.5):
        with opened(tmp_path, audit=share) as store:
            random.seed(7)
            drawn.append([store.auditing.wants() for _ in range(200)])
            ask(generate, models("llama"), store)
            assert random.random() == random.Random(7).random()
    assert not any(drawn[0])
    assert 50 < sum(drawn[1]) < 150


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "all"])
def test_a_share_is_a_number_from_0_to_1(tmp_path, share):
    with pytest.raises(ConfigurationError, match="audit="):
        opened(tmp_path, audit=share)
