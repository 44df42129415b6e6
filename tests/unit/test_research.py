"""Measuring codecs: what is exact measures as exact, what is coarser as worse, and anyone's codec can be measured."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from ghostcacher.codecs.header import TensorField
from ghostcacher.codecs.registry import ENTRY_POINTS, codec_named, offered
from ghostcacher.errors import ConfigurationError
from ghostcacher.research import evaluate, sweep, turns
from ghostcacher.testing.models import random_prompt, tiny_model

SIZES = {"prefix_tokens": 128, "scored_tokens": 32, "block_tokens": 64, "is_timed": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def texts():
    return [random_prompt(160, seed=seed) for seed in range(2)]


@pytest.mark.parametrize("codec", ["raw", "raw.z"])
def test_exact_codecs_measure_as_exact(model, texts, codec):
    measure = evaluate(model, codec, texts, **SIZES)
    assert (measure.kl, measure.top1, measure.perplexity_change) == (0, 1, 0)
    assert measure.bits == 32 if codec == "raw" else measure.bits < 30
    assert measure.header_bits > 0


def test_fewer_bits_cost_more_kl(model, texts):
    measures = sweep(model, texts, ["ec(2.0)", "ec(0.5)", "int4", "int8"], **SIZES)
    by_bits = sorted(measures, key=lambda measure: measure.bits)
    assert [measure.codec for measure in by_bits] == ["ec(2.0)", "ec(0.5)", "int4", "int8"]
    assert all(least.kl_least <= least.kl <= least.kl_most for least in measures)
    assert measures[0].kl > measures[1].kl > measures[3].kl > 0


@pytest.mark.parametrize("recipe", ["gemma2", "deepseek_v3", "qwen3_next", "lfm2", "deepseek_v4"])
def test_every_kind_of_layer_can_be_measured(recipe, texts):
    found = tiny_model(recipe)
    assert evaluate(found, "raw", texts[:1], **SIZES).kl < 1e-9
    assert evaluate(found, "int8", texts[:1], **SIZES).kl < 1e-2


def test_turns_on_exact_state_cost_nothing_and_on_coded_state_what_the_codec_costs(model):
    text = random_prompt(64 * 6 + 3, seed=1)
    sizes = {"begin_tokens": 128, "turn_tokens": 64}
    exact, coarse = turns(model, "raw", text, **sizes), turns(model, "ec(1.0)", text, **sizes)
    assert len(exact.append) == len(coarse.exact) == 4
    assert max(*exact.append, *exact.exact) < 1e-8
    assert coarse.append[0] == coarse.exact[0] > 1e-3
    assert min(coarse.append[1:]) > 1e-3
    assert coarse.append[1:] != coarse.exact[1:]
    with pytest.raises(ConfigurationError, match="turns of 64"):
        turns(model, "raw", text[:, :150], **sizes)


def test_table_and_plot(model, texts, tmp_path):
    codecs = ["raw", "int8", "ec(1.0)"]
    files, sizes = {"table": tmp_path / "t.csv", "plot": tmp_path / "p.svg"}, {**SIZES, "is_timed": True}
    measures = sweep(model, texts[:1], codecs, **files, **sizes)
    assert all(measure.decode_share > 0 for measure in measures)
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [row["codec"] for row in rows] == codecs
    assert [float(row["kl"]) for row in rows] == [measure.kl for measure in measures]
    texts_drawn = set(re.findall("<text [^>]*>([^<]*)</text>", (tmp_path / "p.svg").read_text()))
    assert {"int8", "ec(1.0)"} <= texts_drawn


@dataclass(frozen=True)
class Zeros:
    """Forgets everything: what the measure must call bad."""

    name: ClassVar[str] = "zeros"
    lossy: ClassVar[bool] = True

    def parameters(self):
        return {}

    def for_layout(self, layout):
        return self

    def fields(self, group, piece):
        return (TensorField(f"{group.name}.nothing", "U8", (1,)),)

    def encode(self, group, tensor, piece):
        return {f"{group.name}.nothing": torch.zeros(1, dtype=torch.uint8)}

    def decode(self, group, piece, parts, room=None, spread=None):
        return torch.zeros(group.shape(piece.tokens), dtype=group.spec.torch_dtype)


def test_a_codec_of_ones_own(model, texts):
    measure = evaluate(model, Zeros(), texts, **SIZES)
    assert measure.codec == "zeros"
    assert measure.bits < 0.01
    assert measure.kl > evaluate(model, "ec(2.0)", texts, **SIZES).kl


def test_an_installed_codec_is_found_by_its_name(model, texts, monkeypatch, tmp_path):
    """A package offers one by an entry point; a store then writes and reads with it."""
    folder = tmp_path / "zeros_codec-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: zeros-codec\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nzeros = {__name__}:Zeros\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    offered.cache_clear()
    assert type(codec_named("zeros")).__name__ == "Zeros"
    assert evaluate(model, "zeros", texts[:1], **SIZES).bits < 0.01
    offered.cache_clear()


@pytest.mark.parametrize("sizes", [{"prefix_tokens": 100}, {"prefix_tokens": 192}])
def test_sizes_that_do_not_fit(model, texts, sizes):
    with pytest.raises(ConfigurationError):
        evaluate(model, "raw", texts, **{**SIZES, **sizes})
