"""Every field of a namespace, changed alone, must miss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.adapters import base as adapters
from ghostcacher.adapters.base import ModelAdapter
from ghostcacher.blocks import KVLayout
from ghostcacher.config import StoreConfig
from ghostcacher.testing.models import random_prompt, tiny_model

PROMPT = random_prompt(40, seed=1)


def config(**changes):
    options = {
        "directory": "unused", "device": None, "memory": None, "disk": None, "remote": None, "codec": "raw",
        "block_tokens": 16, "salt": None, "strict": False,
    }  # fmt: skip
    return StoreConfig.parse(**{**options, **changes})


def namespace(model, **changes):
    adapter = ModelAdapter(model)
    adapter.prepare(model)
    return adapter.identify(model, config(**changes), "sampled", tokens=1).namespace


def other_weights(model, monkeypatch):
    return namespace(tiny_model("llama", seed=1))


def other_config(model, monkeypatch):
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}
    return namespace(model)


def other_unknown_config_field(model, monkeypatch):
    model.config.some_field_of_the_future = 3
    return namespace(model)


def other_attention(model, monkeypatch):
    model.set_attn_implementation("eager")
    return namespace(model)


def other_dtype(model, monkeypatch):
    return namespace(model.to(torch.bfloat16))


def other_quantization(model, monkeypatch):
    model.config.quantization_config = {"quant_method": "something", "bits": 4}
    return namespace(model)


def other_layout(model, monkeypatch):
    adapter = ModelAdapter(model)
    adapter.prepare(model)
    shape = adapter.shape
    adapter.shape = replace(shape, layout=KVLayout(shape.layout.layers[:-1]))
    return adapter.identify(model, config(), "sampled", tokens=1).namespace


def other_transformers(model, monkeypatch):
    monkeypatch.setattr("ghostcacher.adapters.identity.TRANSFORMERS_VERSION", (5, 99))
    return namespace(model)


def other_block_size(model, monkeypatch):
    return namespace(model, block_tokens=32)


def other_salt(model, monkeypatch):
    return namespace(model, salt="tenant")


FIELDS = [other_weights, other_config, other_unknown_config_field, other_attention, other_dtype, other_quantization,
          other_layout, other_transformers, other_block_size, other_salt]  # fmt: skip


@pytest.mark.parametrize("change", FIELDS)
def test_f18_f19_f23_a_field_changed_alone_gives_another_namespace(change, monkeypatch):
    model = tiny_model("llama")
    before = namespace(model)
    assert change(model, monkeypatch) != before


def test_where_the_files_lie_does_not_matter():
    one, two = tiny_model("llama"), tiny_model("llama")
    two.config._name_or_path = "/somewhere/else"
    assert namespace(one) == namespace(two)


def test_device_batch_and_codec_stay_out():
    model = tiny_model("llama")
    assert namespace(model) == namespace(model, codec="int8", memory="1MiB", strict=True)


@pytest.mark.parametrize("options", [{"salt": "b"}, {"block_tokens": 32}])
def test_f74_stores_that_differ_share_nothing(tmp_path, generate, options):
    model = tiny_model("llama")
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=16, salt="a") as store:
        generate(model, PROMPT, GhostCache(model, store))
    with ghostcacher.open_store(tmp_path, memory=None, **{"block_tokens": 16, "salt": "a", **options}) as store:
        cache = GhostCache(model, store)
        generate(model, PROMPT, cache)
        assert cache.report.cached_tokens == 0


def test_config_changed_between_two_prompts_is_noticed(tmp_path, generate):
    model = tiny_model("llama")
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=16) as store:
        cache = GhostCache(model, store)
        generate(model, PROMPT, cache)
        model.set_attn_implementation("eager")
        answer = generate(model, PROMPT, cache)
        assert cache.report.cached_tokens == 0
        assert torch.equal(answer, generate(model, PROMPT))


def test_a_tensor_parallel_model_that_does_not_say_how_runs_cold():
    model = tiny_model("llama")
    model._tp_size = 2
    assert "tensor parallel" in (adapters.ModelAdapter(model).refusal or "")
