"""The codec that is calibrated for a model: from `calibrate` to blocks that another process reads."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.codecs.kvt import KvtCodec
from ghostcacher.codecs.registry import codec_named
from ghostcacher.errors import ConfigurationError, UnsupportedModelError
from ghostcacher.keys import TABLES
from ghostcacher.research import calibrate, evaluate, steps_of
from ghostcacher.testing.faulty import FaultyStore
from ghostcacher.testing.models import random_prompt, tiny_model

PROMPT = random_prompt(200, seed=4)
SIZES = {"prefix_tokens": 128, "scored_tokens": 32}
TEXTS = [random_prompt(160, seed=seed) for seed in (11, 12, 13)]


@pytest.fixture(scope="module")
def learned(models):
    known = {}

    def get(recipe):
        if recipe not in known:
            known[recipe] = calibrate(models(recipe), TEXTS, **SIZES)
        return known[recipe]

    return get


@pytest.fixture
def calibrated(learned, tmp_path):
    """A store whose disk tier has the tables of a model."""

    def opened(recipe, codec="kvt(0.25)", **given):
        store = ghostcacher.open_store(tmp_path, memory=None, block_tokens=64, codec=codec, **given)
        store.shelf.put(*learned(recipe))
        return store

    return opened


def test_gradients_change_neither_model_nor_random_state(learned):
    model = tiny_model("llama")
    model.train()
    model.lm_head.weight.requires_grad = False
    state, weights = torch.get_rng_state(), [weight.clone() for weight in model.parameters()]
    told = []
    calibrate(model, TEXTS, progress=told.append, **SIZES)
    assert len(told) == steps_of(len(TEXTS))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), weights, strict=True))
    assert model.training
    assert [weight.requires_grad for weight in (model.lm_head.weight, model.model.norm.weight)] == [False, True]
    assert all(weight.grad is None for weight in model.parameters())


def test_equal_calibrations_are_equal_assets(learned):
    if torch.get_default_device().type != "cpu":
        pytest.skip("a GPU adds gradients up in no fixed order")
    again = calibrate(tiny_model("llama"), TEXTS, **SIZES)
    assert again.tables.digest == learned("llama").tables.digest
    assert again.weights == learned("llama").weights
    assert calibrate(tiny_model("llama", seed=1), TEXTS[:1], **SIZES).weights != again.weights


@pytest.mark.parametrize("recipe", ["llama", "gemma2", "deepseek_v3", "qwen3_next", "falcon_h1"])
def test_less_step_is_less_kl_and_more_bits(recipe, learned, models):
    tables = learned(recipe).tables
    measured = [
        evaluate(models(recipe), KvtCodec(step, tables), TEXTS[:2], block_tokens=64, is_timed=False, **SIZES)
        for step in (2.0, 0.5, 0.1)
    ]  # fmt: skip
    assert measured[0].kl > measured[1].kl > measured[2].kl
    assert measured[0].bits < measured[1].bits < measured[2].bits
    assert [measure.codec for measure in measured] == ["kvt(2)", "kvt(0.5)", "kvt(0.1)"]


def test_at_equal_kl_it_takes_fewer_bits_than_without_weights_and_basis(learned, models):
    """On a random model; what it is worth on a real one is in docs/quantisation.md."""
    tables = learned("llama").tables
    plain = evaluate(models("llama"), "ec(0.5)", TEXTS, block_tokens=128, is_timed=False, **SIZES)
    ours = evaluate(models("llama"), KvtCodec(tables.step(plain.kl), tables), TEXTS, block_tokens=128,
                    is_timed=False, **SIZES)  # fmt: skip
    assert ours.kl < 1.5 * plain.kl
    assert ours.bits < plain.bits


@pytest.mark.parametrize("recipe", ["llama", "gemma2", "deepseek_v3", "qwen3_next"])
def test_blocks_are_read_after_a_restart(recipe, calibrated, models, with_logits):
    model = models(recipe)
    cold = with_logits(model, PROMPT, new=1)[1]
    with calibrated(recipe) as store:
        with_logits(model, PROMPT, GhostCache(model, store), new=1)
        store.flush()
        assert store.stats().tiers[0].stored >= 3
    with ghostcacher.open_store(store.config.directory, memory=None, block_tokens=64, codec="kvt(0.25)") as store:
        cache = GhostCache(model, store)
        warm = with_logits(model, PROMPT, cache, new=1)[1]
        stats = store.stats().tiers[0]
    assert cache.report.cached_tokens >= 192
    assert (cache.report.lossy, stats.lossy, stats.codec) == (True, True, "kvt(0.25)")
    assert 0 < (warm - cold).abs().max() < 2.0


def test_without_tables_nothing_is_stored_and_the_event_says_what_to_do(models, generate, tmp_path):
    events = []
    with ghostcacher.open_store(tmp_path, memory="16MiB", block_tokens=64, codec="kvt(0.25)") as store:
        store.observers.append(events.append)
        generate(models("llama"), PROMPT, GhostCache(models("llama"), store), new=1)
        store.flush()
        assert [tier.stored for tier in store.stats().tiers] == [4, 0]
    assert {(event.kind, event.reason) for event in events if event.tier == "disk"} == {("dropped", "uncalibrated")}


def test_entries_without_their_tables_are_misses_that_come_back_with_them(calibrated, models, generate, learned):
    model = models("llama")
    with calibrated("llama") as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
    asset = store.config.directory / "v1" / TABLES.hex
    hidden = asset.rename(asset.with_name("hidden"))
    for is_there in (False, True):
        if is_there:
            hidden.rename(asset)
        with ghostcacher.open_store(store.config.directory, memory=None, block_tokens=64, codec="int8") as again:
            cache = GhostCache(model, again)
            generate(model, PROMPT, cache, new=1)
            assert cache.report.cached_tokens == (199 if is_there else 0)
            again.close()


def test_other_tables_are_never_taken_for_those_that_an_entry_names(calibrated, models, generate, learned):
    model = models("llama")
    with calibrated("llama") as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
    asset = store.config.directory / "v1" / TABLES.hex
    name = learned("llama").tables.digest
    (asset / name[:2] / f"{name}.safetensors").write_bytes(learned("gemma2").tables.blob)
    with ghostcacher.open_store(store.config.directory, memory=None, block_tokens=64, codec="kvt(0.25)") as again:
        cache = GhostCache(model, again)
        generate(model, PROMPT, cache, new=1)
        assert cache.report.cached_tokens == 0


def test_a_remote_store_brings_its_tables_along(models, generate, learned, tmp_path):
    model, given = models("llama"), {"memory": None, "block_tokens": 64, "remote": f"file://{tmp_path}/far"}
    with ghostcacher.open_store(disk=None, codec="kvt(0.25)", **given) as store:
        store.shelf.put(*learned("llama"))
        generate(model, PROMPT, GhostCache(model, store), new=1)
    with ghostcacher.open_store(tmp_path / "near", codec="raw", remote_codec="kvt(0.5)", **given) as other:
        cache = GhostCache(model, other)
        generate(model, PROMPT, cache, new=1)
        assert (cache.report.tier, cache.report.lossy) == ("remote", True)
        assert cache.report.cached_tokens >= 192


def test_what_cannot_be_calibrated(models):
    with pytest.raises(ConfigurationError, match="160 tokens"):
        calibrate(models("llama"), [random_prompt(159)], **SIZES)
    with pytest.raises(ConfigurationError, match="texts"):
        calibrate(models("llama"), [], **SIZES)
    with pytest.raises(UnsupportedModelError, match="mamba"):
        calibrate(models("mamba"), TEXTS, **SIZES)


@pytest.mark.parametrize("text", ["kvt", "kvt(0)", "kvt(9)", "kvt(x)"])
def test_steps_out_of_range(text):
    with pytest.raises(ConfigurationError, match="kvt"):
        codec_named(text)


def test_layers_of_unequal_reach_are_each_averaged_over_what_they_hold(models, learned):
    """gemma2's windows hold 7 tokens beside 128."""
    model = models("gemma2")
    sums = [0.0] * 4
    for text in TEXTS:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(text[:, :128], past_key_values=cache)
        for number, layer in enumerate(cache.layers):
            held = layer.values[0].transpose(0, 1).flatten(1)
            sums[number] += (held[4:] if len(held) == 128 else held).mean(0) / len(TEXTS)
    table = learned("gemma2").tables.groups["values"]
    assert torch.allclose(table.mean, torch.stack(sums).cpu(), atol=1e-4)


def test_changed_weights_have_tables_of_their_own(generate, tmp_path):
    model = tiny_model("llama")
    first = calibrate(model, TEXTS[:1], **SIZES)
    model.load_state_dict(tiny_model("llama", seed=1).state_dict())
    second = calibrate(model, TEXTS[:1], **SIZES)
    assert second.weights != first.weights
    assert second.weights == calibrate(tiny_model("llama", seed=1), TEXTS[:1], **SIZES).weights


def test_a_hit_from_memory_reads_no_other_tier(calibrated, models, generate):
    model = models("llama")
    with calibrated("llama") as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
    given = {"memory": "16MiB", "block_tokens": 64, "codec": "kvt(0.25)"}
    with ghostcacher.open_store(store.config.directory, **given) as both:
        generate(model, PROMPT, GhostCache(model, both), new=1)
        both.flush()
        both.tiers[1].store = spy = FaultyStore(both.tiers[1].store)
        cache = GhostCache(model, both)
        generate(model, PROMPT, cache, new=1)
        del cache
        both.flush()
        assert "get_many" not in spy.calls


def test_channels_that_change_nothing_are_given_no_bits():
    """Values of a layer whose output is thrown away have no gradient."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    spread = calibrate(model, TEXTS[:1], **SIZES).tables.groups["values"].spread.mean(dim=1)
    assert spread[1] < 0.01 * min(spread[0], spread[2], spread[3])


def test_measuring_inside_attach_is_no_prompt_of_anybodys(models, tmp_path):
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64) as store:
        with ghostcacher.attach(models("llama"), store) as attached:
            for _ in range(2):
                assert evaluate(models("llama"), "raw", TEXTS[:1], block_tokens=64, is_timed=False, **SIZES).kl < 1e-9
            store.flush()
        assert attached.reports == []
        assert store.stats().tiers[0].stored == 0
