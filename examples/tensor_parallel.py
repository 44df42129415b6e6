# /// script
# requires-python = ">=3.11"
# dependencies = ["ghostcacher", "torch"]
# ///
"""One model whose heads are shared out among processes: each stores its own, all reuse the same length.

torchrun --nproc-per-node 2 examples/tensor_parallel.py --model NAME

Without --model a small random llama is made, whose two key-value heads make two processes. Start it twice with one
--directory: the second launch reuses what the first one stored. Another number of processes finds nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ghostcacher

PROMPT_TOKENS = 512


def small_model(folder: Path) -> None:
    """A random model of two key-value heads, the same in every launch."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


def main(model_name: str | None, directory: Path) -> None:
    """Print, for each rank, what it reused of one prompt, and the answer."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    if model_name is None and rank == 0:
        small_model(directory / "model")
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(model_name or directory / "model", tp_plan="auto")
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    prompt = prompt.to(model.device)
    with ghostcacher.open_store(directory / "blocks") as store:
        cache = ghostcacher.GhostCache(model, store)
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=4, do_sample=False
        )
    for turn in range(dist.get_world_size()):
        if turn == rank:
            print(f"rank {rank}: {out[0, PROMPT_TOKENS:].tolist()} [{cache.report}]", flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--directory", type=Path, default=Path("tensor-parallel"))
    chosen = parser.parse_args()
    main(chosen.model, chosen.directory)
