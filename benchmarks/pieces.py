"""How far a warm answer is from a cold one, in fp32 and bf16, for every kind of layer.

python benchmarks/pieces.py [--tokens 192] [--cut 160]

Random models of the parity matrix. "Same pieces" is a run of transformers alone that is cut at the same place: what is
left is what putting state back changes. "One piece" is an ordinary cold run: what is left is what matrix products of
another shape change, too. Largest difference of the last token's logits, and the largest logit.
"""

from __future__ import annotations

import argparse
import warnings

import torch
import transformers
from transformers import DynamicCache

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.adapters.probe import run
from ghostcacher.hooks import hooks_of
from ghostcacher.testing.models import RECIPES, random_prompt, tiny_model

OMITTED = {"minimax", "recurrent_gemma", "llama with dynamic rope", "phi3", "mamba", "jamba"}
"""Refused, dropping the cache, or given one token at a time."""


def in_pieces(model: torch.nn.Module, ids: torch.Tensor, cut: int) -> torch.Tensor:
    """The last logits of transformers alone, with the first ``cut`` tokens in a forward of their own."""
    cache = DynamicCache(config=model.config)
    run(model, ids[:, :cut], cache)
    return run(model, ids[:, cut:], cache, cut)


def row(recipe: str, dtype: torch.dtype, tokens: int, cut: int) -> str:
    """One line of the table."""
    model, ids = tiny_model(recipe, dtype=dtype), random_prompt(tokens, seed=5)
    donor = torch.cat([ids[:, :cut], (ids[:, cut : cut + 4] + 1) % 100 + 2], 1)
    with ghostcacher.open_store(memory="1GiB", disk=None, block_tokens=16) as store:
        run(model, donor, GhostCache(model, store, boundaries=[cut]))
        store.flush()
        cache = GhostCache(model, store)
        warm = run(model, ids, cache)
        if cache.report.cached_tokens != cut:
            raise RuntimeError(f"{recipe} was to be cut at {cut}: {cache.report}")
    cold, pieces = run(model, ids, DynamicCache(config=model.config)), in_pieces(model, ids, cut)
    layers = ", ".join(dict.fromkeys(kind.name for kind in hooks_of(model).adapter.shape.kinds))
    same, one = float((warm - pieces).abs().max()), float((warm - cold).abs().max())
    return f"| {recipe} ({layers}) | {str(dtype)[6:]} | {same:.1e} | {one:.1e} | {float(cold.abs().max()):.1f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--cut", type=int, default=160)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print("| model (layers) | dtype | same pieces | one piece | largest logit |\n|---|---|--:|--:|--:|")
    for recipe in RECIPES:
        if recipe not in OMITTED:
            for dtype in (torch.float32, torch.bfloat16):
                print(row(recipe, dtype, chosen.tokens, chosen.cut))


if __name__ == "__main__":
    main()
