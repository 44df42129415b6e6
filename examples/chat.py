# /// script
# requires-python = ">=3.11"
# dependencies = ["ghostcacher", "torch", "gguf"]
# ///
"""A chat whose every turn finds its history: a fresh cache per turn, as a server would make it.

The history is found because answers are stored too, token by token as they come. Lines are read from standard
input; an empty line ends the chat.
"""

from __future__ import annotations

import argparse
import sys

import torch

from ghostcacher import GhostCache, open_store
from ghostcacher.cli.demo_model import load


def main(model_name: str | None, directory: str | None, answer_tokens: int) -> None:
    loaded = load(model_name)
    chat = [{"role": "system", "content": "You are brief."}]
    with open_store(directory) as store:
        for line in iter(sys.stdin.readline, ""):
            if not line.strip():
                break
            chat.append({"role": "user", "content": line.strip()})
            ids = loaded.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            cache = GhostCache(loaded.model, store)
            out = loaded.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=answer_tokens,
                do_sample=False,
                past_key_values=cache,
            )
            answer = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            chat.append({"role": "assistant", "content": answer})
            print(f"{answer}\n  [{cache.report}]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--directory")
    parser.add_argument("--answer-tokens", type=int, default=24)
    arguments = parser.parse_args()
    main(arguments.model, arguments.directory, arguments.answer_tokens)
