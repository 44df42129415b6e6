"""What tiers cost in quality, as `stats` says it, against what the model says after their blocks."""

from __future__ import annotations

import json
import math

import pytest
import torch
import typer
from transformers import DynamicCache
from typer.testing import CliRunner

import ghostcacher
from ghostcacher import GhostCache, lookup
from ghostcacher.cli.calibrate import register
from ghostcacher.codecs.base import fresh, one_by_one
from ghostcacher.codecs.int8 import Int8Codec
from ghostcacher.codecs.kvt import KvtCodec
from ghostcacher.codecs.quality import divergence
from ghostcacher.codecs.registry import CODECS
from ghostcacher.errors import BlockError, ConfigurationError, UnsupportedModelError
from ghostcacher.research import COMPARED, calibrate, evaluate
from ghostcacher.testing.models import random_prompt, tiny_model
from ghostcacher.testing.words import word_tokenizer, words_of

PROMPT = random_prompt(200, seed=4)
SIZES = {"prefix_tokens": 128, "scored_tokens": 32}
TEXTS = [random_prompt(160, seed=seed) for seed in (11, 12, 13)]


@pytest.fixture(scope="module")
def learned(models):
    return calibrate(models("llama"), TEXTS, **SIZES)


def opened(tmp_path, **given):
    return ghostcacher.open_store(tmp_path / "near", block_tokens=64, **given)


def expected(store):
    store.flush()
    return [tier.kl_expected for tier in store.stats().tiers]


def test_each_tier_says_what_its_codec_costs_on_the_model(models, generate, learned, tmp_path):
    tables = learned.tables
    given = {"codec": "int8", "remote": f"file://{tmp_path}/far", "remote_codec": "ec(0.35)"}
    with opened(tmp_path, **given) as store:
        generate(models("llama"), PROMPT, GhostCache(models("llama"), store), new=1)
        assert expected(store) == [0.0, None, None]
        store.shelf.put(*learned)
        in_memory, on_disk, far = expected(store)
        assert store.stats().as_dict()["tiers"][1]["kl_expected"] == on_disk
    assert (in_memory, on_disk) == (0.0, pytest.approx(tables.costs["int8"]))
    assert far == pytest.approx(tables.cost("ec(0.35)"))
    assert tables.costs["ec(0.25)"] < far < tables.costs["ec(0.5)"]
    with opened(tmp_path, **given) as store:  # whose RAM takes what the disk gives
        cache = GhostCache(models("llama"), store)
        generate(models("llama"), PROMPT, cache, new=1)
        assert cache.report.tier == "disk"
        assert expected(store)[:2] == [pytest.approx(on_disk)] * 2


def test_a_codec_that_was_not_measured_is_not_taken_for_another_tiers(models, generate, tmp_path):
    learned = calibrate(models("llama"), TEXTS[:1], codecs=["int8"], **SIZES)
    with opened(tmp_path, codec="int8", remote=f"file://{tmp_path}/far", remote_codec="ec(0.35)") as store:
        store.shelf.put(*learned)
        generate(models("llama"), PROMPT, GhostCache(models("llama"), store), new=1)
        assert expected(store) == [0.0, pytest.approx(learned.tables.costs["int8"]), None]


def test_what_is_said_is_what_was_measured(models, learned):
    """By the codec's own evaluation; and that, by running the model on what was coded."""
    model, costs = models("llama"), learned.tables.costs
    assert set(costs) == set(COMPARED)
    for codec in ("int8", "ec(0.5)"):
        assert costs[codec] == evaluate(model, codec, TEXTS[:2], block_tokens=128, is_timed=False, **SIZES).kl
    assert costs["bf16"] < costs["int4"]
    assert costs["int8"] < costs["int4"]
    kls = []
    for text in TEXTS[:2]:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(text[:, :128], past_key_values=cache)
            held = [(layer.keys.bfloat16().float(), layer.values.bfloat16().float()) for layer in cache.layers]
            coded = model(text[:, 128:160], past_key_values=DynamicCache(held, config=model.config)).logits[0]
            kls.append(divergence(model(text[:, :160]).logits[0, 128:], coded))
    assert costs["bf16"] == pytest.approx(sum(kls) / 2, rel=0.05)


def test_exact_tiers_cost_nothing_and_ask_nobody(models, generate, tmp_path, monkeypatch):
    with opened(tmp_path, codec="raw.z") as store:
        monkeypatch.setattr(store.shelf, "of_model", lambda _: 1 / 0)
        assert expected(store) == [0.0, 0.0]
        generate(models("llama"), PROMPT, GhostCache(models("llama"), store), new=1)
        assert expected(store) == [0.0, 0.0]


def test_a_tier_of_several_codecs_is_their_mean_over_tokens(models, generate, learned, tmp_path):
    model, costs = models("llama"), learned.tables.costs
    with opened(tmp_path, memory=None, codec="int4") as store:
        store.shelf.put(*learned)
        generate(model, PROMPT[:, :128], GhostCache(model, store), new=1)
        assert expected(store) == [pytest.approx(costs["int4"])]
    with opened(tmp_path, memory=None, codec="int8") as store:
        generate(model, PROMPT[:, :193], GhostCache(model, store), new=1)
        (found,) = expected(store)
        tokens = store.stats().tiers[0].tokens
    assert tokens == 193
    assert found == pytest.approx((128 * costs["int4"] + 65 * costs["int8"]) / 193)


def test_another_model_in_the_same_store_is_not_spoken_for(models, generate, learned, tmp_path):
    other = tiny_model("llama", seed=1)
    with opened(tmp_path, memory=None, codec="int8") as store:
        store.shelf.put(*learned)
        generate(models("llama"), PROMPT, GhostCache(models("llama"), store), new=1)
        assert expected(store) == [pytest.approx(learned.tables.costs["int8"])]
        generate(other, PROMPT, GhostCache(other, store), new=1)
        assert expected(store) == [None]
        theirs = calibrate(other, TEXTS, codecs=["int8"], **SIZES)
        store.shelf.put(*theirs)
        ours, each = learned.tables.costs["int8"], theirs.tables.costs["int8"]
        assert expected(store) == [pytest.approx((ours + each) / 2)]
        assert ours != each


def test_certified_blocks_count_as_they_were_replayed(models, generate, tmp_path):
    model = models("llama")
    with opened(tmp_path, memory=None, quality=0.05) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
        (found,) = expected(store)
        (replayed,) = set(store.stats().tiers[0].kl_quartiles)
    assert found == pytest.approx(replayed * 192 / 200)  # the open block waits exactly


def test_an_exact_block_on_top_of_a_lossy_one_costs_what_that_costs(models, generate, tmp_path):
    """Turn after turn in a new process: open blocks wait exactly, on a prefix that was restored."""
    model = models("llama")
    for end in (192, 150, 260, 300):
        with opened(tmp_path, memory="16MiB", quality=0.05) as store:
            generate(model, random_prompt(300, seed=4)[:, :end], GhostCache(model, store), new=1)
            near, found = expected(store)
            entries = {entry.key.digest: entry for entry in store.tiers[1].index.entries()}
    (tail,) = (entry for entry in entries.values() if entry.kl is None)
    assert (tail.lossy, tail.codec, tail.key.start) == (True, "raw", 256)
    costs = [entry.kl if entry.kl is not None else entries[entry.key.parent].kl for entry in entries.values()]
    lengths = [entry.key.length for entry in entries.values()]
    assert found == pytest.approx(sum(kl * n for kl, n in zip(costs, lengths, strict=True)) / sum(lengths))
    assert 0 < near < max(costs)


def test_what_a_remote_store_has_only_named_counts_when_it_is_read(models, generate, learned, tmp_path):
    model, given = models("llama"), {"memory": None, "disk": None, "remote": f"file://{tmp_path}/far", "codec": "int8"}
    with opened(tmp_path, **given) as store:
        store.shelf.put(*learned)
        generate(model, PROMPT, GhostCache(model, store), new=1)
        store.flush()
        before = store.stats().tiers[0]
    with opened(tmp_path, **given) as store:
        cache = GhostCache(model, store)
        assert lookup(model, PROMPT[0].tolist(), store).tokens == 199
        named = store.stats().tiers[0]
        generate(model, PROMPT, cache, new=1)
        store.flush()
        read = store.stats().tiers[0]
    assert (named.tokens, named.size_bytes, named.kl_expected) == (0, 0, 0.0)
    assert (read.tokens, read.size_bytes) == (before.tokens, before.size_bytes) == (200, before.size_bytes)
    assert read.kl_expected == before.kl_expected == pytest.approx(learned.tables.costs["int8"])


def test_the_command_measures_what_it_is_told_and_stats_say_it(models, generate, tmp_path):
    model, folder, text = models("llama"), tmp_path / "model", tmp_path / "text"
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    text.write_text(words_of(random_prompt(384, seed=11)))
    sizes = ["--prefix-tokens", "128", "--codec", "ec(2)", "--codec", "int8", "--format", "json"]
    command = typer.Typer()
    register(command)
    done = CliRunner().invoke(command, [str(folder), "--text", str(text), "-d", str(tmp_path / "near"), *sizes])
    assert done.exit_code == 0, done.output
    costs = json.loads(done.stdout)["costs"]
    assert [cost["codec"] for cost in costs] == [*COMPARED, "ec(2)"]
    with opened(tmp_path, memory=None, codec="ec(2)") as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
        assert expected(store) == [pytest.approx(costs[-1]["kl"])]


@pytest.mark.parametrize("codec", ["kvt(0.25)", "quality(0.001)", "int9"])
def test_codecs_that_cannot_be_compared(codec, models):
    with pytest.raises(ConfigurationError, match=codec.partition("(")[0]):
        calibrate(models("llama"), TEXTS, codecs=["int8", codec], **SIZES)


class Refusing(Int8Codec):
    """Codes nothing."""

    name = "refusing"

    def encode(self, group, tensor, piece):
        raise BlockError("nonfinite", "never")


class Ruining(Int8Codec):
    """Gives back what no model can go on from."""

    name = "ruining"

    def decode(self, group, piece, parts, room=fresh, spread=one_by_one):
        return Int8Codec.decode(self, group, piece, parts, room, spread).fill_(torch.nan)


def test_a_codec_that_refuses_or_ruins_the_state_has_no_cost(models, monkeypatch):
    monkeypatch.setitem(CODECS, "refusing", Refusing)
    monkeypatch.setitem(CODECS, "ruining", Ruining)
    tables = calibrate(models("llama"), TEXTS[:1], codecs=["refusing", "ruining", "int8"], **SIZES).tables
    assert list(tables.costs) == ["int8"]
    assert [tables.cost(codec) for codec in ("refusing", "ruining")] == [None, None]


def test_a_curve_that_cannot_be_measured_is_an_error(models, monkeypatch):
    kvt = KvtCodec.decode
    monkeypatch.setattr(KvtCodec, "decode", lambda *given: kvt(*given).fill_(torch.nan))
    with pytest.raises(UnsupportedModelError, match="nan"):
        calibrate(models("llama"), TEXTS[:1], **SIZES)


def test_tokens_that_a_model_rules_out_cost_nothing():
    exact, coded = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[0.5, 1.0, -torch.inf]])
    assert 0 < divergence(exact, coded) == pytest.approx(divergence(exact[:, :2], coded[:, :2]))
    assert divergence(exact[:, [0, 1, 1]], coded) == torch.inf
    assert divergence(exact, exact) == 0.0
    assert math.isnan(divergence(exact, coded * torch.nan))
