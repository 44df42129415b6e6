"""Stores with each codec, through generate: exact ones exactly, lossy ones closely, and always said."""

from __future__ import annotations

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.errors import ConfigurationError
from ghostcacher.testing.models import random_prompt

PROMPT = random_prompt(200, seed=4)
LARGEST_ERROR = {
    "raw": 1e-4, "raw.z": 1e-4, "bf16": 0.1, "int8": 0.1, "int4": 1.5, "ec(0.06)": 0.3, "ec(0.5)": 2.5, "bnb_int8": 0.5,
}  # fmt: skip
"""Of logits up to 4, on a tiny random model whose attention is far from uniform."""


@pytest.mark.parametrize("codec", LARGEST_ERROR)
def test_what_comes_back_is_close_and_says_what_it_is(codec, models, with_logits, tmp_path):
    model = models("llama")
    cold = with_logits(model, PROMPT, new=1)[1]
    for _ in range(2):
        with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64, codec=codec) as store:
            cache = GhostCache(model, store)
            warm = with_logits(model, PROMPT, cache, new=1)[1]
            store.flush()
            stats = store.stats().tiers[0]
    is_exact = codec in {"raw", "raw.z"}
    assert cache.report.cached_tokens == 199
    assert (cache.report.lossy, stats.lossy) == (not is_exact, not is_exact)
    assert stats.codec == codec
    assert (warm - cold).abs().max() < LARGEST_ERROR[codec]
    assert bool((warm == cold).all()) <= is_exact


def test_fewer_bits_take_fewer_bytes(models, generate, tmp_path):
    sizes = []
    for codec in ("raw", "raw.z", "bf16", "int8", "int4"):
        with ghostcacher.open_store(tmp_path / codec, memory=None, block_tokens=64, codec=codec) as store:
            generate(models("llama"), PROMPT[:, :192], GhostCache(models("llama"), store), new=1)
            store.flush()
            sizes.append(store.stats().tiers[0].bytes_per_token)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[3] < 0.5 * sizes[0]


@pytest.mark.parametrize("recipe", ["gemma2", "deepseek_v3", "deepseek_v32", "qwen3_next", "lfm2", "falcon_h1"])
@pytest.mark.parametrize("codec", ["raw.z", "int8", "int4", "ec(0.25)"])
def test_every_kind_of_layer(recipe, codec, models, with_logits, tmp_path):
    """What a codec does not know stays as it is: index keys, recurrent and convolutional state."""
    model = models(recipe)
    cold = with_logits(model, PROMPT, new=1)[1]
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64, codec=codec) as store:
        for _ in range(2):
            cache = GhostCache(model, store)
            warm = with_logits(model, PROMPT, cache, new=1)[1]
            store.flush()
    assert cache.report.cached_tokens >= 192
    assert cache.report.lossy == (codec != "raw.z")
    if recipe != "deepseek_v32" or codec == "raw.z":  # which entries an index picks changes all at once
        assert (warm - cold).abs().max() < (1e-4 if codec == "raw.z" else 2.5)


def test_a_codec_for_each_tier(models, generate, tmp_path):
    model = models("llama")
    given = {"memory": "16MiB:int8", "disk": "1GiB:raw.z", "remote": "memory://codecs", "remote_codec": "ec(0.5)"}
    with ghostcacher.open_store(tmp_path, block_tokens=64, codec="int4", **given) as store:
        for _ in range(2):
            cache = GhostCache(model, store)
            generate(model, PROMPT, cache, new=1)
            store.flush()
        tiers = {tier.name: tier for tier in store.stats().tiers}
    assert {name: tier.codec for name, tier in tiers.items()} == {
        "memory": "int8", "disk": "raw.z", "remote": "ec(0.5)",
    }  # fmt: skip
    assert tiers["memory"].hits == 4
    assert cache.report.tier == "memory"
    assert cache.report.lossy
    assert tiers["remote"].size_bytes < tiers["memory"].size_bytes < tiers["disk"].size_bytes


def test_what_is_lossy_is_passed_on_as_it_is_and_never_coded_twice(models, generate, tmp_path):
    model = models("llama")
    far = {"memory": None, "block_tokens": 64, "remote": f"file://{tmp_path}/far", "remote_codec": "ec(0.5)"}
    with ghostcacher.open_store(disk=None, **far) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
    with ghostcacher.open_store(tmp_path / "near", disk="1GiB:int8", **far) as store:
        cache = GhostCache(model, store)
        generate(model, PROMPT, cache, new=1)
        del cache
        store.flush()
        near = {name.name: name.read_bytes() for name in (tmp_path / "near").rglob("*.safetensors")}
        again = GhostCache(model, store)
        generate(model, PROMPT, again, new=1)
    away = {name.name: name.read_bytes() for name in (tmp_path / "far").rglob("*.safetensors")}
    shared = near.keys() & away.keys()
    assert len(shared) >= 3
    assert all(near[name] == away[name] for name in shared)
    assert all(b"ec" in near[name][:4096] for name in shared)
    assert (again.report.tier, again.report.lossy) == ("disk", True)


def test_a_turn_computed_on_a_lossy_prefix_is_coded_once_with_the_tiers_codec(models, generate, tmp_path):
    model, longer = models("llama"), torch.cat([PROMPT, random_prompt(64, seed=5)], dim=1)
    far = {"memory": None, "block_tokens": 64, "remote": f"file://{tmp_path}/far", "remote_codec": "ec(0.5)"}
    with ghostcacher.open_store(disk=None, **far) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
    with ghostcacher.open_store(tmp_path / "near", disk="1GiB:int8", **far) as store:
        cache = GhostCache(model, store)
        generate(model, longer, cache, new=1)
        assert cache.report.lossy
        del cache
        store.flush()
        codecs = [name.read_bytes()[:4096] for name in (tmp_path / "near").rglob("*.safetensors")]
    assert sum(b'\\"name\\":\\"ec\\"' in head for head in codecs) == 3
    assert sum(b'\\"name\\":\\"int8\\"' in head for head in codecs) == 2
    assert all(b'\\"lossy\\":true' in head for head in codecs)


def test_a_store_of_exact_tiers_is_exact(models, generate, tmp_path):
    model = models("llama")
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64, codec="int8") as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64, codec="raw.z") as store:
        cache = GhostCache(model, store)
        assert torch.equal(generate(model, PROMPT, cache, new=1), generate(model, PROMPT, new=1))
        assert cache.report.cached_tokens == 0


@pytest.mark.parametrize("given", [{"codec": "zip"}, {"disk": "1GiB:zip"}, {"memory": "1GiB:"}, {"remote_codec": "ec"}])
def test_codecs_that_do_not_exist(given, tmp_path):
    with pytest.raises(ConfigurationError, match="codec="):
        ghostcacher.open_store(tmp_path, **given)
