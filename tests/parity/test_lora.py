"""Adapters of peft: each state of them is a model of its own, and going back finds what was stored."""

from __future__ import annotations

import contextlib

import pytest
import torch

from ghostcacher import GhostCache, attach
from ghostcacher.testing.models import random_prompt, tiny_model

peft = pytest.importorskip("peft", reason="`make test` installs peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.is_gradient_checkpointing.:FutureWarning")
PROMPT = random_prompt(40, seed=5)


@pytest.fixture
def adapted():
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_model("llama"), config, adapter_name="one")
    model.add_adapter("two", config)
    return model.eval()


def one(model):
    model.set_adapter("one")
    return contextlib.nullcontext()


def two(model):
    model.set_adapter("two")
    return contextlib.nullcontext()


def off(model):
    model.set_adapter("one")
    return model.disable_adapter()


@contextlib.contextmanager
def merged(model):
    model.set_adapter("one")
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


STATES = {"one": one, "two": two, "off": off, "merged": merged}


def answer(model, generate, cache=None):
    return generate(model, PROMPT, cache)


@pytest.mark.parametrize("asked", STATES)
@pytest.mark.parametrize("stored", STATES)
def test_only_the_same_adapters_hit(adapted, store, generate, stored, asked):
    with STATES[stored](adapted):
        answer(adapted, generate, GhostCache(adapted, store))
        store.flush()
        if stored == asked:
            again = GhostCache(adapted, store)
            assert torch.equal(answer(adapted, generate, again), answer(adapted, generate))
            assert again.report.cached_tokens == 39
            return
    with STATES[asked](adapted):
        expected = answer(adapted, generate)
        cache = GhostCache(adapted, store)
        assert torch.equal(answer(adapted, generate, cache), expected)
        assert cache.report.cached_tokens == 0


def test_switching_back_finds_what_was_stored(adapted, store, generate):
    for name in ("one", "two"):
        adapted.set_adapter(name)
        answer(adapted, generate, GhostCache(adapted, store))
        store.flush()
    adapted.set_adapter("one")
    cache = GhostCache(adapted, store)
    answer(adapted, generate, cache)
    assert cache.report.cached_tokens == 39


def test_a_new_scaling_is_a_new_model(adapted, store, generate):
    answer(adapted, generate, GhostCache(adapted, store))
    store.flush()
    for module in adapted.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["one"] *= 2
    cache = GhostCache(adapted, store)
    expected = answer(adapted, generate)
    assert torch.equal(answer(adapted, generate, cache), expected)
    assert cache.report.cached_tokens == 0


def test_a_batch_of_mixed_adapters_runs_cold(adapted, store, generate):
    """Which row gets which adapter never reaches the forward: peft hooks its layers for the call."""
    ids = torch.cat([PROMPT, PROMPT])
    names = ["one", "two"]
    expected = generate(adapted, ids, adapter_names=names)
    with attach(adapted, store) as attached:
        for _ in range(2):
            assert torch.equal(generate(adapted, ids, adapter_names=names), expected)
    assert {report.reason for report in attached.reports} == {"bypass: hooks on the model's layers"}
