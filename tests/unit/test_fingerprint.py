"""Weights changed in place, by every way that users have."""

from __future__ import annotations

import copy

import pytest
import torch

from ghostcacher import GhostCache
from ghostcacher.adapters.base import ModelAdapter
from ghostcacher.adapters.fingerprint import WeightsFingerprint
from ghostcacher.adapters.walk import walk
from ghostcacher.testing.models import random_prompt, tiny_model

PROMPT = random_prompt(40, seed=1)


@pytest.fixture
def model():
    return tiny_model("llama", seed=4)


def weights(model):
    return [p for p in model.parameters() if p.dim() > 1]


def optimizer_step(optimizer_class, **options):
    def change(model):
        optimizer = optimizer_class(model.parameters(), lr=1e-6, **options)
        model(PROMPT, labels=PROMPT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return change


def data_write(model):
    weights(model)[3].data.add_(0.01)


def data_assignment(model):
    weights(model)[3].data = weights(model)[3].data * 1.01


def in_place_without_grad(model):
    with torch.no_grad():
        weights(model)[3].mul_(1.01)


def numpy_view(model):
    view = weights(model)[3].detach().numpy()
    view *= 1.01


def load_state_dict(model):
    state = {name: value * 1.01 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def load_one_value(model):
    """So small a change that only the load hook can tell."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["model.layers.1.mlp.up_proj.weight"].view(-1)[7] += 1.0
    model.load_state_dict(state)


def assign_state_dict(model):
    model.load_state_dict({name: value * 1.01 for name, value in model.state_dict().items()}, assign=True)


def new_parameter(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.01)


def half_and_back(model):
    model.half().float()


def merged_adapter(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    merged = peft.get_peft_model(model, config).merge_and_unload()
    assert merged is model


CHANGES = {
    "SGD": optimizer_step(torch.optim.SGD),
    "AdamW": optimizer_step(torch.optim.AdamW, foreach=True),
    "fused AdamW": optimizer_step(torch.optim.AdamW, fused=True),
    "p.data.add_": data_write,
    "p.data =": data_assignment,
    "no_grad": in_place_without_grad,
    "numpy view": numpy_view,
    "load_state_dict": load_state_dict,
    "load_state_dict, one value": load_one_value,
    "load_state_dict(assign=True)": assign_state_dict,
    "new Parameter": new_parameter,
    "half().float()": half_and_back,
    "peft merge": merged_adapter,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.is_gradient_checkpointing.:FutureWarning")
def test_f15_every_change_gives_another_namespace_and_the_right_answer(model, store, generate, change):
    generate(model, PROMPT, GhostCache(model, store))
    store.flush()
    before = GhostCache(model, store)
    generate(model, PROMPT, before)
    assert before.report.cached_tokens == 39
    CHANGES[change](model)
    cache = GhostCache(model, store)
    answer = generate(model, PROMPT, cache)
    assert cache.report.cached_tokens == 0
    assert torch.equal(answer, generate(model, PROMPT))


def test_changing_back_finds_the_old_state(model, store, generate):
    generate(model, PROMPT, GhostCache(model, store))
    kept = weights(model)[3].detach().clone()
    data_write(model)
    generate(model, PROMPT, GhostCache(model, store))
    weights(model)[3].data.copy_(kept)
    store.flush()
    cache = GhostCache(model, store)
    generate(model, PROMPT, cache)
    assert cache.report.cached_tokens == 39


def test_f15_always_sees_what_a_sample_cannot(model, store, generate):
    generate(model, PROMPT, GhostCache(model, store))
    model.model.layers[2].mlp.up_proj.weight.data.view(-1)[7] += 1.0
    sampled = GhostCache(model, store)
    generate(model, PROMPT, sampled)
    assert sampled.report.cached_tokens == 39, "documented: one unsampled value written through .data is not seen"
    cache = GhostCache(model, store, fingerprint="always")
    answer = generate(model, PROMPT, cache)
    assert cache.report.cached_tokens == 0
    assert torch.equal(answer, generate(model, PROMPT))


def test_equal_weights_have_equal_digests(model):
    twin = copy.deepcopy(model)
    digests = {WeightsFingerprint().current(m, walk(m).tensors) for m in (model, twin, tiny_model("llama", seed=4))}
    assert len(digests) == 1


def test_an_unchanged_model_is_digested_once(model):
    fingerprint = WeightsFingerprint()
    for _ in range(5):
        fingerprint.current(model, walk(model).tensors)
    assert fingerprint.full_digests == 1


def test_weights_that_cannot_be_read_run_cold(store, generate):
    model = tiny_model("llama", seed=4)
    adapter = ModelAdapter(model)
    model.to("meta")
    adapter.prepare(model)
    assert adapter.refusal is not None


def test_loading_into_a_copy_does_not_disturb_the_original(model):
    adapter = ModelAdapter(model)
    adapter.prepare(model)
    twin = copy.deepcopy(model)
    load_state_dict(twin)
    assert adapter.refusal is None
