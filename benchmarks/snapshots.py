"""What models with recurrent state pay for their snapshots, and what filling 32 layers costs beside copying bytes.

python benchmarks/snapshots.py [--tokens 2048] [--repeats 9]

Random models of 8 layers and width 512, one torch thread, runs taking turns; medians of ratios within one round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache
from workbench import THREADS

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.adapters.base import base_module
from ghostcacher.adapters.calls import CallReader
from ghostcacher.hooks import hooks_of
from ghostcacher.testing.models import random_prompt, tiny_model

WIDE = {"hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 8192}
HYBRIDS = {
    "qwen3_next": {**WIDE, "num_hidden_layers": 8, "layer_types": ["linear_attention", "full_attention"] * 4},
    "falcon_h1": {**WIDE, "num_hidden_layers": 8, "mamba_d_ssm": 1024, "mamba_n_heads": 16, "mamba_d_head": 64},
    "nemotron_h": {
        **WIDE, "mamba_num_heads": 16, "mamba_head_dim": 64, "layers_block_type": ["linear_attention", "mlp"] * 3
        + ["full_attention", "mlp"],
    },
}  # fmt: skip
DEEP = {"llama": 32, "mistral": 32, "qwen3_next": 32}


def processor_seconds(work: Callable[[], object]) -> float:
    """Processor time of this thread for one call."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def first_seen(recipe: str, tokens: int, repeats: int) -> str:
    """A never seen prompt with a GhostCache, which takes snapshots, against one without."""
    model = tiny_model(recipe, **HYBRIDS[recipe])
    name = CallReader(model).cache_name
    ratios, cold = [], []
    with ghostcacher.open_store(memory="2GiB", disk=None) as store:
        generate(model, random_prompt(64), {name: GhostCache(model, store)})
        for number in range(repeats):
            prompt = random_prompt(tokens, seed=number + 1)
            cold.append(processor_seconds(lambda prompt=prompt: generate(model, prompt, {})))
            cache = GhostCache(model, store)
            with_cache = processor_seconds(lambda prompt=prompt, cache=cache: generate(model, prompt, {name: cache}))
            ratios.append(with_cache / cold[-1])
            store.flush()
    return f"| {recipe} | {statistics.median(cold) * 1e3:,.0f} ms | {statistics.median(ratios):.3f} |"


def own_work(recipe: str, layers: int, tokens: int, repeats: int) -> str:
    """Making the layers ours, and freezing and viewing what they hold for storing: no byte is copied by either."""
    types = {"layer_types": ["linear_attention", "full_attention"] * (layers // 2)} if recipe == "qwen3_next" else {}
    model = tiny_model(recipe, num_hidden_layers=layers, max_position_embeddings=8192, **types)
    name = CallReader(model).cache_name
    adapter = hooks_of(base_module(model)).adapter
    with ghostcacher.open_store(memory="2GiB", disk=None) as store:
        cache = GhostCache(model, store)
        generate(model, random_prompt(tokens), {name: cache})
        state = adapter.state_of(cache)
        stock = [DynamicCache(config=model.config) for _ in range(repeats)]
        inject = [processor_seconds(lambda fresh=fresh: adapter.state_of(fresh)) for fresh in stock]
        capture = [processor_seconds(state.frozen) for _ in range(repeats)]
    inject_ms, capture_ms = statistics.median(inject) * 1e3, statistics.median(capture) * 1e3
    return f"| {recipe} | {layers} | {inject_ms:.2f} ms | {capture_ms:.2f} ms |"


def generate(model: torch.nn.Module, prompt: torch.Tensor, given: dict[str, GhostCache]) -> None:
    """One new token."""
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False, **given)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(THREADS)
    print("| model | cold prefill | first seen / cold |", "|---|---|---|", sep="\n")
    for recipe in HYBRIDS:
        print(first_seen(recipe, asked.tokens, asked.repeats), flush=True)
    print("\n| model | layers | making layers ours | viewing for capture |", "|---|---|---|---|", sep="\n")
    for recipe, layers in DEEP.items():
        print(own_work(recipe, layers, asked.tokens, asked.repeats), flush=True)


if __name__ == "__main__":
    main()
