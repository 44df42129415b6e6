"""``ghostcacher demo``: one process cold, another warm from disk, on a real model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ghostcacher.cli.output import Format, emit, fail, table
from ghostcacher.config import default_directory
from ghostcacher.units import format_bytes, format_seconds

PROBLEMS = 1


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    model: Annotated[
        str | None, typer.Option(help="Hub model or local folder; default: a 135M chat model from PyPI.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--directory", "-d", help="Default: 'demo' in the default store.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Empty the demo's own store first.")] = False,
    output: Annotated[Format, typer.Option("--format", "-f", help="What to print.")] = Format.human,
) -> None:
    """Ask about a document of 3,000 tokens: cold in one process, warm in another. Exit code 1 if answers differ."""
    root = directory if directory is not None else default_directory() / "demo"
    runs = [*_runs("cold", model, root, fresh=fresh), *_runs("warm", model, root, fresh=False)]
    halves = len(runs) // 2
    equal = [run["answer_tokens"] for run in runs[:halves]] == [run["answer_tokens"] for run in runs[halves:]]
    emit(output, {"runs": runs}, table(_COLUMNS, [_row(run) for run in runs]))
    if output is Format.human:
        emit(output, None, _verdict(runs, halves, equal=equal))
    if not equal:
        raise typer.Exit(PROBLEMS)


_COLUMNS = ("run", "first token", "prompt tokens", "reused", "from", "size")


def _row(run: dict[str, Any]) -> list[object]:
    return [
        run["name"], format_seconds(run["ttft_seconds"]), run["prompt_tokens"], run["cached_tokens"],
        run["tier"] or "-", format_bytes(run["bytes"]),
    ]  # fmt: skip


def _verdict(runs: list[dict[str, Any]], halves: int, *, equal: bool) -> str:
    ratio = sum(run["ttft_seconds"] for run in runs[:halves]) / sum(run["ttft_seconds"] for run in runs[halves:])
    answers = "the answers are equal, token by token" if equal else "THE ANSWERS DIFFER"
    return f"{answers}; the warm process gave its first tokens {ratio:.1f} times sooner than the cold one"


def _runs(name: str, model: str | None, root: Path, *, fresh: bool) -> list[dict[str, Any]]:
    """Run one process of the demo; its runs."""
    command = [
        sys.executable,
        "-m",
        "ghostcacher.cli.demo_process",
        name,
        str(root),
        model or "",
        "fresh" if fresh else "",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 (our own module)
    if done.returncode:
        fail(f"the {name} process of the demo ended with exit code {done.returncode}")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found
