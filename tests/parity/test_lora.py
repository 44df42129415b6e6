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
def test_f20_only_the_same_adapters_hit(adapted, store, generate, stored, asked):
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


def test_f20_a_batch_of_mixed_adapters_runs_cold(adapted, store, generate):
    """Which row gets which adapter never reaches the forward: peft hooks its layers for the call."""
    ids = torch.cat([PROMPT, PROMPT])
    names = ["one", "two"]
    expected = generate(adapted, ids, adapter_names=names)
    with attach(adapted, store) as attached:
        for _ in range(2):
            assert torch.equal(generate(adapted, ids, adapter_names=names), expected)
    assert {report.reason for report in attached.reports} == {"bypass: hooks on the model's layers"}


def test_adapters_that_are_off_share_with_the_model_without_them(adapted, store, generate):
    bare = tiny_model("llama")
    generate(bare, PROMPT, GhostCache(bare, store))
    store.flush()
    with off(adapted):
        cache = GhostCache(adapted, store)
        assert torch.equal(answer(adapted, generate, cache), generate(bare, PROMPT))
        assert cache.report.cached_tokens == 39
    cache = GhostCache(adapted, store)
    answer(adapted, generate, cache)
    assert cache.report.cached_tokens == 0


INVOCATION = [5, 6]
INVOKED_AT = 30


def invoked(prompt, *, at=INVOKED_AT):
    ids = prompt.clone()
    ids[ids == INVOCATION[0]] = 7
    ids[:, at : at + 2] = torch.tensor(INVOCATION)
    return ids


@pytest.fixture
def activated():
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM",
        alora_invocation_tokens=INVOCATION,
    )  # fmt: skip
    torch.manual_seed(2)
    return peft.get_peft_model(tiny_model("llama"), config).eval()


def served(model, store, with_logits, ids, cache=None, **options):
    """The tokens reused of one prompt, whose answer must be that of a cold run."""
    cold = with_logits(model, ids, **options)
    cache = cache if cache is not None else GhostCache(model, store)
    warm = with_logits(model, ids, cache, **options)
    torch.testing.assert_close(warm[1], cold[1], atol=1e-4, rtol=0)
    assert torch.equal(warm[0], cold[0])
    store.flush()
    return cache.report.cached_tokens


def test_activated_lora_reuses_the_base_model_up_to_its_invocation(activated, store, with_logits):
    ids, bare = invoked(PROMPT), tiny_model("llama")
    assert served(bare, store, with_logits, ids) == 0
    assert served(activated, store, with_logits, ids) == INVOKED_AT
    assert served(activated, store, with_logits, ids) == INVOKED_AT


def test_activated_lora_stores_nothing_from_its_invocation_on(activated, store, with_logits):
    ids, bare = invoked(PROMPT), tiny_model("llama")
    assert served(activated, store, with_logits, ids) == 0
    assert served(bare, store, with_logits, ids) == INVOKED_AT
    assert served(bare, store, with_logits, ids) == 39


def test_one_cache_with_and_without_invocation(activated, store, with_logits):
    ids, cache = invoked(PROMPT), GhostCache(activated, store)
    served(activated, store, with_logits, ids, cache)
    longer = torch.cat([ids, random_prompt(12, seed=8)], dim=1)
    with activated.disable_adapter():
        assert served(activated, store, with_logits, longer, cache) == INVOKED_AT
    assert served(activated, store, with_logits, longer, cache) == INVOKED_AT


def test_without_an_invocation_it_is_the_base_model(activated, store, with_logits):
    ids, bare = invoked(PROMPT)[:, :INVOKED_AT], tiny_model("llama")
    served(activated, store, with_logits, ids)
    assert served(bare, store, with_logits, ids) == INVOKED_AT - 1


def test_rows_invoked_at_different_places(activated, store, with_logits):
    late, early = invoked(PROMPT, at=34), invoked(random_prompt(40, seed=6), at=20)
    early[:, :6] = 0
    mask = torch.ones((2, 40), dtype=torch.long)
    mask[1, :6] = 0
    ids = torch.cat([late, early])
    assert served(activated, store, with_logits, ids, attention_mask=mask) == 0
    assert served(activated, store, with_logits, ids, attention_mask=mask) == 20


def test_activated_lora_over_recurrent_state_runs_cold(memory_store, with_logits):
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM",
        alora_invocation_tokens=INVOCATION,
    )  # fmt: skip
    model = peft.get_peft_model(tiny_model("qwen3_next"), config).eval()
    cache = GhostCache(model, memory_store)
    assert served(model, memory_store, with_logits, invoked(PROMPT), cache) == 0
    assert cache.report.reason.startswith("bypass: activated LoRA")


def test_other_adapter_weights_are_another_model(adapted, store, generate):
    answer(adapted, generate, GhostCache(adapted, store))
    store.flush()
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B.one" in name).mul_(1.5)
    cache = GhostCache(adapted, store)
    assert torch.equal(answer(adapted, generate, cache), answer(adapted, generate))
    assert cache.report.cached_tokens == 0


def test_chunks_of_an_activated_prompt_are_not_taken_from_the_base_model(activated, store, with_logits):
    """peft counts its offset from the end of each chunk; whatever that gives cold, it must give here."""
    ids, bare = invoked(PROMPT), tiny_model("llama")
    served(bare, store, with_logits, torch.cat([ids, random_prompt(4, seed=9)], 1))
    served(activated, store, with_logits, ids, prefill_chunk_size=16)
