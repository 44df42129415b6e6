"""What the benchmarks share: a plain copy of the real model, prompts, rivals, timing."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from ghostcacher.adapters.calls import CallReader
from ghostcacher.adapters.layers import GrowingLayer
from ghostcacher.cli.demo_model import load, real_text

SUFFIX_TOKENS = 32
THREADS = 1


@dataclass
class Bench:
    """The model, its text as token ids ``[1, tokens]``, and the name under which it takes a cache."""

    model: Any
    text: torch.Tensor
    cache_name: str

    @classmethod
    def at(cls, folder: Path) -> Bench:
        """Load the plain copy in ``folder``, making it first if need be (loading it is ten times quicker)."""
        torch.set_num_threads(THREADS)
        if not (folder / "config.json").exists():
            save_plain_copy(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        text = AutoTokenizer.from_pretrained(folder)(real_text(), return_tensors="pt").input_ids
        return cls(model, text, CallReader(model).cache_name)

    def prompt(self, tokens: int, number: int, shared: int | None = None) -> torch.Tensor:
        """``tokens`` of the text, of which the first ``shared`` (all) are stored ones, and suffix ``number``."""
        at = 10_000 + number * SUFFIX_TOKENS
        kept = tokens if shared is None else shared
        return torch.cat([self.text[:, :kept], self.text[:, at : at + SUFFIX_TOKENS + tokens - kept]], dim=1)

    def generate(self, ids: torch.Tensor, cache: Any = None, new: int = 1, **options: Any) -> torch.Tensor:
        """Greedy, exactly ``new`` tokens."""
        given = {} if cache is None else {self.cache_name: cache}
        mask = torch.ones_like(ids)
        return self.model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **given, **options
        )

    def first_token(self, ids: torch.Tensor, cache: Any = None) -> float:
        """Seconds of a generate of one token."""
        return seconds_of(lambda: self.generate(ids, cache))

    def prefilled(self, ids: torch.Tensor) -> DynamicCache:
        """A stock cache that holds ``ids``."""
        cache = DynamicCache(config=self.model.config)
        with torch.no_grad():
            self.model(ids, **{self.cache_name: cache}, use_cache=True, logits_to_keep=1)
        return cache


class Limit:
    """The least that restoring can cost: one copy into memory that is there already, and the suffix's forward."""

    def __init__(self, bench: Bench, filled: DynamicCache, tokens: int) -> None:
        self._bench = bench
        self._states = [
            (layer.keys[:, :, :tokens].clone(), layer.values[:, :, :tokens].clone()) for layer in filled.layers
        ]
        room = tokens + 512
        self._room = [
            tuple(state.new_zeros(*state.shape[:2], room, state.shape[3]) for state in pair) for pair in self._states
        ]
        self._tokens = tokens

    def first_token(self, ids: torch.Tensor) -> float:
        """Seconds of copy and generate."""
        cache = DynamicCache(config=self._bench.model.config)
        cache.layers[:] = [GrowingLayer() for _ in cache.layers]

        def run() -> None:
            for layer, (keys, values), (k, v) in zip(cache.layers, self._room, self._states, strict=True):
                keys[:, :, : self._tokens] = k
                values[:, :, : self._tokens] = v
                layer.adopt(keys, values, self._tokens)
            self._bench.generate(ids, cache)

        return seconds_of(run)


def deepcopied(bench: Bench, filled: DynamicCache, ids: torch.Tensor) -> float:
    """The recipe of the transformers documentation."""
    return seconds_of(lambda: bench.generate(ids, copy.deepcopy(filled)))


def save_by_hand(filled: DynamicCache, path: Path) -> None:
    """Twenty lines that a user could write: one file for one known prefix."""
    state = {}
    for number, layer in enumerate(filled.layers):
        state[f"k{number}"], state[f"v{number}"] = layer.keys.contiguous(), layer.values.contiguous()
    save_file(state, path)


def loaded_by_hand(bench: Bench, path: Path, ids: torch.Tensor) -> float:
    """The other half of `save_by_hand`."""

    def run() -> None:
        state = load_file(path)
        cache = DynamicCache(config=bench.model.config)
        for number in range(len(cache.layers)):
            cache.update(state[f"k{number}"], state[f"v{number}"], number)
        bench.generate(ids, cache)

    return seconds_of(run)


class TokenTimes:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        """See transformers' BaseStreamer."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""

    def median_step(self) -> float:
        """Seconds between two tokens, without prompt and first token."""
        return statistics.median(b - a for a, b in zip(self.times[1:], self.times[2:], strict=False))


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall seconds of one call, and of what it left to a GPU."""
    settle()
    started = time.perf_counter()
    function()
    settle()
    return time.perf_counter() - started


def settle() -> None:
    """Wait for what a GPU still does."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def save_plain_copy(folder: Path) -> None:
    """The package's model without its GGUF packaging: the same fp32 weights, as transformers saves them."""
    loaded = load(None)
    fields = loaded.model.config.to_dict()
    fields.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig(**fields))
    plain.load_state_dict(loaded.model.state_dict())
    plain.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
