"""Injected state against the stored files, as the safetensors library reads them: every kind of layer, every byte."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from ghostcacher import GhostCache
from ghostcacher.adapters.capture import Row, RowCapture
from ghostcacher.adapters.probe import run
from ghostcacher.gate import Line
from ghostcacher.hooks import hooks_of
from ghostcacher.keys import PrefixChain
from ghostcacher.serving import fill
from ghostcacher.testing.models import FULL_ATTENTION, RECIPES, random_prompt

PROMPT = random_prompt(34, seed=5)
CUT = 32
NOT_SERVED = {"minimax", "recurrent_gemma", "llama with dynamic rope", "phi3"}
SERVED = sorted(RECIPES.keys() - NOT_SERVED)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture(params=SERVED)
def model(request, models, dtype):
    try:
        found = models(request.param, dtype=dtype)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        pytest.skip(f"this transformers has no {request.param}: {str(error)[:60]}")
    hooks = hooks_of(found)
    hooks.prepare()
    if hooks.adapter.refusal:
        pytest.skip(hooks.adapter.refusal)
    return found


def test_what_is_injected_is_what_the_file_says(model, store, generate, tmp_path):
    generate(model, PROMPT, GhostCache(model, store, boundaries=[CUT]), new=1)
    store.flush()
    adapter = hooks_of(model).adapter
    chain = PrefixChain.of(PROMPT[0].tolist(), adapter.identify(model, store.config, "sampled", 34).namespace, 16)
    cache = DynamicCache(config=model.config)
    state = adapter.state_of(cache)
    served = fill(store, adapter.shape, state, [Row(0, chain)], have=0, limit=CUT, width=34, floor=int, prefill=Line())
    assert served.columns == CUT
    taken = {CUT: state.snapshot()} if state.has_states else {}
    injected = RowCapture.of(state.frozen(), adapter.shape.layout, 0, Row(0, chain), (), CUT, snapshots=taken)
    keys = [key for key in list(injected.keys()) if key.is_snapshot or adapter.shape.layout.groups]
    assert keys
    for key in keys:
        (file,) = tmp_path.rglob(f"{key.digest.hex()}.safetensors")
        stored = load_file(file)
        tensors = injected.block(key).tensors
        assert len(stored) == len(tensors)
        assert sorted(map(as_bytes, stored.values())) == sorted(map(as_bytes, tensors))


@pytest.mark.parametrize("recipe", [*FULL_ATTENTION, "deepseek_v3"])
def test_full_attention_is_bit_equal_to_a_run_of_the_same_pieces(recipe, models, dtype, store, generate):
    model, prompt = models(recipe, dtype=dtype), random_prompt(40, seed=5)
    if recipe == "bloom" and model.device.type == "cuda":
        pytest.skip("its batched product takes another kernel where buffers have room to grow")
    generate(model, torch.cat([prompt[:, :CUT], random_prompt(4, seed=6)], 1), GhostCache(model, store), new=1)
    store.flush()
    cache, stock = GhostCache(model, store), DynamicCache(config=model.config)
    warm = run(model, prompt, cache)
    assert cache.report.cached_tokens == CUT
    run(model, prompt[:, :CUT], stock)
    assert torch.equal(warm, run(model, prompt[:, CUT:], stock, CUT))


def as_bytes(tensor):
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
