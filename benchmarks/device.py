"""What a hit saves on a GPU: first tokens from each tier, what is left to decoding, what codecs cost there.

python benchmarks/device.py [--write docs/benchmarks.md] [--shapes 1B 8B] [--tokens 2048 8192] [--rounds 5]

Models in bf16 of the shapes of Llama 3.2 1B and Llama 3.1 8B, with random weights: what they answer means nothing, how
long they take does. Ways take turns, and every ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from device_codecs import decoded
from sections import replace_section
from transformers import LlamaConfig, LlamaForCausalLM
from workbench import Bench, Limit, TokenTimes, deepcopied, median, seconds_of, settle

import ghostcacher
from ghostcacher import GhostCache, gate
from ghostcacher.adapters.calls import CallReader
from ghostcacher.tiers.stack import TierStack

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}
SHARED = {
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
TIERS: dict[str, dict[str, Any]] = {
    "device": {"device": "24GiB", "memory": None, "disk": None},
    "memory": {"memory": "24GiB", "disk": None},
    "disk": {"memory": None},
    "disk int8": {"memory": None, "codec": "int8"},
    "disk int4": {"memory": None, "codec": "int4"},
    "disk ec(0.25)": {"memory": None, "codec": "ec(0.25)"},
}
ANSWER_TOKENS = 16
PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class Measured:
    """One shape at one length: seconds by way (medians), ratios by way, and what the gate of each tier decided."""

    title: str
    seconds: Mapping[str, float]
    sooner: Mapping[str, float]
    over_limit: Mapping[str, float]
    decided: Mapping[str, str]
    unseen: float
    decoding: float


def bench_of(shape: str) -> Bench:
    """A random model on the GPU, and random tokens."""
    config = LlamaConfig(**SHARED, **SHAPES[shape], dtype=torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    text = torch.randint(2, 100_000, (1, 120_000), generator=torch.Generator().manual_seed(0)).cuda()
    return Bench(model, text, CallReader(model).cache_name)


def first_cache(bench: Bench) -> float:
    """Seconds of a process's first `GhostCache` of a model: all weights are read, and what they are is digested."""
    with ghostcacher.open_store(memory="1GiB", disk=None) as store:
        return seconds_of(lambda: GhostCache(bench.model, store))


def measure(bench: Bench, title: str, tokens: int, rounds: int) -> Measured:
    """All ways, in turn."""
    prefix = bench.text[:, :tokens]
    bench.generate(prefix)  # the first call of a process is slow, whatever the cache
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        stores = {
            name: opened.enter_context(ghostcacher.open_store(Path(folder) / name, **options))
            for name, options in TIERS.items()
        }
        for store in stores.values():
            bench.generate(prefix, GhostCache(bench.model, store))
            store.flush()
        filled = bench.prefilled(prefix)
        limit = Limit(bench, filled, tokens)
        runs: dict[str, list[float]] = {}
        for number, prompts in enumerate(prompts_of(bench, tokens, rounds + 1)):
            with loaded_at_any_price():
                measured = {
                    "cold": bench.first_token(next(prompts)),
                    "limit": limit.first_token(next(prompts)),
                    "deepcopy": deepcopied(bench, filled, next(prompts)),
                    **{name: warm(bench, store, next(prompts), tokens) for name, store in stores.items()},
                }
            for name, value in measured.items():
                runs.setdefault(name, []).extend([value] if number else [])  # the first round warms up
        del filled, limit
        decided = {name: decision(bench, store, tokens) for name, store in stores.items()}
        unseen = over_plain(bench, stores["memory"], tokens, rounds)
    seconds = {name: median(values) for name, values in runs.items()}
    sooner, over_limit = ratios(runs, "cold", inverted=True), ratios(runs, "limit")
    return Measured(title, seconds, sooner, over_limit, decided, *unseen)


def prompts_of(bench: Bench, tokens: int, rounds: int) -> Iterator[Iterator[torch.Tensor]]:
    """For each round prompts with the same beginning and suffixes of their own."""
    for number in range(rounds):
        yield (bench.prompt(tokens, 20 * number + way) for way in range(20))


@contextmanager
def loaded_at_any_price() -> Iterator[None]:
    """What is slower to load than to compute is loaded all the same: to be measured."""
    kept = gate.GRACE_SECONDS, gate.GRACE_SHARE
    gate.GRACE_SECONDS, gate.GRACE_SHARE = PATIENCE_SECONDS, float("inf")
    try:
        yield
    finally:
        gate.GRACE_SECONDS, gate.GRACE_SHARE = kept


def warm(bench: Bench, store: TierStack, prompt: torch.Tensor, tokens: int) -> float:
    """Seconds to the first token, all of the prefix restored."""
    cache = GhostCache(bench.model, store)
    seconds = bench.first_token(prompt, cache)
    if cache.report.cached_tokens < tokens:
        raise SystemExit(f"not measured what was meant: {cache.report}")
    del cache
    store.flush()
    return seconds


def ratios(runs: Mapping[str, list[float]], base: str, *, inverted: bool = False) -> dict[str, float]:
    """Each way over ``base``, or ``base`` over each way, round by round; their medians."""
    pairs = {name: list(zip(values, runs[base], strict=True)) for name, values in runs.items() if name != base}
    return {name: median([b / a if inverted else a / b for a, b in found]) for name, found in pairs.items()}


def decision(bench: Bench, store: TierStack, tokens: int) -> str:
    """What becomes of a hit once the library has seen how long this model computes: it is loaded, or computed."""
    bench.generate(bench.text[:, 50_000 : 50_000 + tokens], GhostCache(bench.model, store), new=2)
    store.flush()
    cache = GhostCache(bench.model, store)
    bench.generate(bench.prompt(tokens, 900), cache, new=2)
    share = cache.report.cached_tokens / tokens
    return "loaded" if share >= 1 else "computed" if share == 0 else f"{100 * share:.0f} % loaded"


def over_plain(bench: Bench, store: TierStack, tokens: int, rounds: int) -> tuple[float, float]:
    """Ratios to plain `generate`, in turn: never-seen prompts to their first token, and the time per decoded token."""
    first, steps = [], []
    for number in range(rounds + 1):
        found = {}
        for is_ours in (False, True) if number % 2 else (True, False):
            ids = bench.text[:, 60_000 + 777 * number : 60_000 + 777 * number + tokens]
            cache, times = GhostCache(bench.model, store) if is_ours else None, TokenTimes()
            found[is_ours] = timed(bench, ids, cache, times)
            found[is_ours, "step"] = times.median_step()
            del cache
            store.flush()
        first.append(found[True] / found[False])
        steps.append(found[True, "step"] / found[False, "step"])
    return median(first[1:]), median(steps[1:])


def timed(bench: Bench, ids: torch.Tensor, cache: Any, times: TokenTimes) -> float:
    """Seconds to the first token of an answer; when each came is in ``times``."""
    settle()
    started = time.perf_counter()
    bench.generate(ids, cache, new=ANSWER_TOKENS, streamer=times)
    return times.times[1] - started


def section(found: list[Measured], digests: list[float], codecs: list[str]) -> str:
    """The figures as they stand in docs/benchmarks.md."""
    columns = ["", *(each.title for each in found)]
    restored, ways = ["limit", *TIERS, "deepcopy"], [*TIERS, "deepcopy"]
    rest = [
        ["cold first token, ms", *(f"{1e3 * each.seconds['cold']:.0f}" for each in found)],
        ["limit, ms", *(f"{1e3 * each.seconds['limit']:.1f}" for each in found)],
        ["first GhostCache of a process (digests the weights), s", *(f"{each:.2f}" for each in digests)],
        ["never seen: first token over plain `generate`", *(f"{each.unseen:.3f}" for each in found)],
        ["time per decoded token over plain `generate`", *(f"{each.decoding:.3f}" for each in found)],
    ]
    return "\n\n".join([
        f"{machine()}; medians.",
        "### Cold over warm: how many times sooner the first token comes",
        table(columns, [[way, *(f"{each.sooner[way]:.1f}" for each in found)] for way in restored]),
        "### Time to the first token over the limit",
        table(columns, [[way, *(f"{each.over_limit[way]:.2f}" for each in found)] for way in ways]),
        "### What the gate decides, once it has seen how fast the model computes",
        table(columns, [[name, *(each.decided[name] for each in found)] for name in TIERS]),
        "### Milliseconds, and what a cache costs that finds nothing",
        table(columns, rest),
        "### A block of 128 tokens, from its bytes in RAM to its place on the GPU",
        "\n".join(codecs),
    ])  # fmt: skip


def table(columns: list[str], rows: list[list[str]]) -> str:
    """In markdown, numbers to the right."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """The card, and what drives it."""
    return (
        f"{torch.cuda.get_device_name()}, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def main(shapes: list[str], sizes: list[int], rounds: int, page: Path | None) -> None:
    """Measure, print, and write if there is a page."""
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: this benchmark is of what a hit saves on one")
    transformers.logging.set_verbosity_error()
    found, digests, codecs = [], [], []
    for shape in shapes:
        bench = bench_of(shape)
        digests += [first_cache(bench)] * len(sizes)
        for tokens in sizes:
            found.append(measure(bench, f"{shape}, {tokens:,} tokens", tokens, rounds))
            print(found[-1], flush=True)
        codecs = decoded(bench, rounds)
        del bench
        torch.cuda.empty_cache()
    text = section(found, digests, codecs)
    print(text)
    if page is not None:
        replace_section(page, "device", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    main(given.shapes, given.tokens, given.rounds, given.write)
