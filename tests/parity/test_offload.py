"""Models whose weights accelerate keeps in memory or on disk between forwards: served as if they were at hand."""

from __future__ import annotations

import accelerate
import pytest
import torch
from torch import nn

from ghostcacher import GhostCache
from ghostcacher.hooks import hooks_of
from ghostcacher.testing.models import random_prompt, tiny_model

# Before 5.24 generate warns that ids are not on the meta device, where they must not be.
pytestmark = pytest.mark.filterwarnings("ignore:.*input_ids. being on a device type:UserWarning")
PROMPT = random_prompt(40, seed=3)
ONE_OF_EACH_KIND = (
    "llama", "deepseek_v3", "gemma2", "gemma4_text", "deepseek_v32", "lfm2", "qwen3_next", "falcon_h1", "mamba2",
    "inkling_text", "deepseek_v4", "minimax_m3_vl_text",
)  # fmt: skip


def here():
    return str(torch.get_default_device())


def to_memory(model, _):
    return accelerate.cpu_offload(model, execution_device=here())


def to_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=here())


def spread(model, folder):
    """Every other layer on disk, as a ``device_map`` does that has no room for all."""
    base = model.base_model_prefix
    places = {name: here() for name, _ in model.named_children() if name != base}
    for name, part in getattr(model, base).named_children():
        if isinstance(part, nn.ModuleList):
            places |= {f"{base}.{name}.{n}": "disk" if n % 2 else here() for n in range(len(part))}
        else:
            places[f"{base}.{name}"] = here()
    return accelerate.dispatch_model(model, places, main_device=here(), offload_dir=folder)


WAYS = {"memory": to_memory, "disk": to_disk, "spread": spread}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recipe", ONE_OF_EACH_KIND)
def test_an_offloaded_model_finds_what_it_stored(recipe, way, memory_store, with_logits, tmp_path):
    try:
        model = tiny_model(recipe)
    except ValueError as error:
        pytest.skip(str(error)[:60])
    expected = with_logits(model, PROMPT)
    model = WAYS[way](model, tmp_path / "weights")
    for _ in range(2):
        cache = GhostCache(model, memory_store)
        if hooks_of(model).adapter.refusal:
            pytest.skip(hooks_of(model).adapter.refusal)
        tokens, logits = with_logits(model, PROMPT, cache)
        torch.testing.assert_close(logits, expected[1], atol=1e-4, rtol=0)
        assert torch.equal(tokens, expected[0])
        memory_store.flush()
    assert cache.report.cached_tokens >= 32


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_or_not_it_is_the_same_model(way, memory_store, generate, tmp_path):
    model = tiny_model("llama")
    generate(model, PROMPT, GhostCache(model, memory_store))
    memory_store.flush()
    offloaded = WAYS[way](tiny_model("llama"), tmp_path / "weights")
    for _ in range(2):
        cache = GhostCache(offloaded, memory_store)
        generate(offloaded, PROMPT, cache)
        assert cache.report.cached_tokens == 39
    assert hooks_of(offloaded).adapter._weights.full_digests == 1


def test_weights_changed_in_the_memory_they_are_kept_in(memory_store, generate):
    model = to_memory(tiny_model("llama"), None)
    generate(model, PROMPT, GhostCache(model, memory_store))
    memory_store.flush()
    kept = model.model.layers[1].self_attn.k_proj._hf_hook.weights_map["weight"]
    kept.mul_(1.5)
    cache = GhostCache(model, memory_store)
    expected = generate(model, PROMPT)
    assert torch.equal(generate(model, PROMPT, cache), expected)
    assert cache.report.cached_tokens == 0


def test_weights_changed_on_disk_are_seen_by_always(memory_store, generate, tmp_path):
    model = to_disk(tiny_model("llama"), tmp_path / "weights")
    generate(model, PROMPT, GhostCache(model, memory_store))
    memory_store.flush()
    file = tmp_path / "weights" / "model.layers.1.self_attn.k_proj.weight.dat"
    file.write_bytes(bytes(len(file.read_bytes())))
    cache = GhostCache(model, memory_store, fingerprint="always")
    expected = generate(model, PROMPT)
    assert torch.equal(generate(model, PROMPT, cache), expected)
    assert cache.report.cached_tokens == 0


def test_weights_that_nobody_can_read_run_cold(memory_store):
    model = tiny_model("llama").to("meta")
    adapter = hooks_of(model).adapter
    hooks_of(model).prepare()
    assert "meta" in (adapter.refusal or "")
