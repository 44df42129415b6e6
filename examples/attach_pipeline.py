# /// script
# requires-python = ">=3.11"
# dependencies = ["ghostcacher", "torch", "gguf"]
# ///
"""Cache what a transformers pipeline generates, without touching the pipeline."""

from __future__ import annotations

import argparse

from transformers import pipeline

import ghostcacher
from ghostcacher.cli.demo_model import load, real_text


def main(model_name: str | None, directory: str | None) -> None:
    loaded = load(model_name)
    pipe = pipeline("text-generation", model=loaded.model, tokenizer=loaded.tokenizer)
    system = {"role": "system", "content": f"Answer from this text.\n\n{real_text()[:2000]}"}
    with ghostcacher.open_store(directory) as store, ghostcacher.attach(loaded.model, store) as attached:
        for question in ("What is an assertion?", "What is an assignment?"):
            chat = [system, {"role": "user", "content": question}]
            answer = pipe(chat, max_new_tokens=16, do_sample=False, return_full_text=False)
            print(answer[0]["generated_text"])
            print(f"  {attached.reports[-1]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--directory")
    arguments = parser.parse_args()
    main(arguments.model, arguments.directory)
