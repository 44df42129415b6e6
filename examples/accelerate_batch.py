# /// script
# requires-python = ">=3.11"
# dependencies = ["ghostcacher", "torch", "gguf", "accelerate"]
# ///
"""Many questions on one document, shared out among the processes of a launch that share one store.

torchrun --nproc-per-node 2 examples/accelerate_batch.py      (or: accelerate launch …)

The first process computes the document; the others wait for it and find it on disk, or in Redis with --remote. Each
then answers its own share of the questions.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

import ghostcacher
from ghostcacher.cli.demo_model import load, real_text

QUESTIONS = (
    "What is this text about?", "Name one keyword.", "Which statement comes first?", "Is this about Python?",
)  # fmt: skip


def main(
    model_name: str | None, directory: str | None, remote: str | None, document_tokens: int, answer_tokens: int
) -> None:
    """Print, for every question, which process answered it and what it reused."""
    state = PartialState(cpu=not torch.cuda.is_available())
    loaded = load(model_name)
    model, tokenizer = loaded.model.to(state.device), loaded.tokenizer
    document = tokenizer(real_text(), return_tensors="pt").input_ids[:, :document_tokens].to(state.device)
    options = {"max_new_tokens": answer_tokens, "do_sample": False}
    with ghostcacher.open_store(directory, remote=remote) as store, ghostcacher.attach(model, store) as attached:
        if state.is_main_process:
            model.generate(document, attention_mask=torch.ones_like(document), **{**options, "max_new_tokens": 1})
            store.flush()
        state.wait_for_everyone()
        lines = []
        with state.split_between_processes(list(QUESTIONS)) as mine:
            for question in mine:
                asked = tokenizer(f"\n\n{question}\n", return_tensors="pt").input_ids.to(state.device)
                prompt = torch.cat([document, asked], dim=1)
                model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
                lines.append(f"process {state.process_index}: {question} [{attached.reports[-1]}]")
    state.print(*gather_object(lines), sep="\n")  # by one process: lines of several would run into each other
    state.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--directory")
    parser.add_argument("--remote")
    parser.add_argument("--document-tokens", type=int, default=1024)
    parser.add_argument("--answer-tokens", type=int, default=8)
    chosen = parser.parse_args()
    main(chosen.model, chosen.directory, chosen.remote, chosen.document_tokens, chosen.answer_tokens)
