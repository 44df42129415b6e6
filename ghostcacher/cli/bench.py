"""``ghostcacher bench``: what the cache does for a model on this machine, as ratios within one run."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Annotated, Any

import typer
from tqdm import tqdm

from ghostcacher.cli.output import Format, emit, table
from ghostcacher.units import format_seconds

SUFFIX_TOKENS = 32


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    model: Annotated[
        str | None, typer.Option(help="Hub model or local folder; default: a 135M chat model from PyPI.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=32, help="Tokens of the shared prefix.")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, help="Warm runs of each kind; medians are printed.")] = 5,
    output: Annotated[Format, typer.Option("--format", "-f", help="What to print.")] = Format.human,
) -> None:
    """Time the first token of a prompt with a known prefix: cold, from RAM, from disk."""
    import torch

    from ghostcacher.cli.demo_model import load, real_text
    from ghostcacher.cli.demo_process import loaded_name

    loaded = load(model)
    text = loaded.tokenizer(real_text(), return_tensors="pt").input_ids.to(loaded.model.device)
    prefix, rest = text[:, :tokens], text[:, tokens:]
    suffixes = [rest[:, n * SUFFIX_TOKENS : (n + 1) * SUFFIX_TOKENS] for n in range(2 * repeats + 1)]
    prompts = [torch.cat([prefix, suffix], dim=1) for suffix in suffixes]
    rows = _measure(loaded.model, loaded_name(loaded), prefix, prompts, repeats)
    emit(output, {"prefix_tokens": tokens, "runs": rows}, table(_COLUMNS, [_row(row, rows[0]) for row in rows]))


_COLUMNS = ("run", "first token", "cold / this", "reused")


def _row(row: dict[str, Any], cold: dict[str, Any]) -> list[object]:
    ratio = cold["ttft_seconds"] / row["ttft_seconds"]
    return [row["name"], format_seconds(row["ttft_seconds"]), f"{ratio:.1f}", row["cached_tokens"]]


def _measure(model: Any, keyword: str, prefix: Any, prompts: list[Any], repeats: int) -> list[dict[str, Any]]:
    from ghostcacher import GhostCache, open_store

    with (
        tempfile.TemporaryDirectory() as folder,
        open_store(folder, memory="4GiB") as near,
        open_store(folder, memory=None) as far,
        tqdm(total=2 * repeats + 2, disable=None, leave=False) as bar,
    ):
        _first_token(model, {keyword: GhostCache(model, near)}, prefix, bar)
        near.flush()
        rows = [{"name": "cold", "ttft_seconds": _first_token(model, {}, prompts[0], bar), "cached_tokens": 0}]
        for name, store, mine in (("memory", near, prompts[1 : repeats + 1]), ("disk", far, prompts[repeats + 1 :])):
            seconds = []
            for prompt in mine:
                cache = GhostCache(model, store)
                seconds.append(_first_token(model, {keyword: cache}, prompt, bar))
                store.flush()
            row = {
                "name": name,
                "ttft_seconds": statistics.median(seconds),
                "cached_tokens": cache.report.cached_tokens,
            }
            rows.append(row)
    return rows


def _first_token(model: Any, given: dict[str, Any], ids: Any, bar: Any) -> float:
    import torch

    started = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, **given)
    bar.update(1)
    return time.perf_counter() - started
