"""``ghostcacher calibrate``: what the codec kvt needs to know of a model, learned once and kept in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from ghostcacher.cli.output import Format, emit, fail
from ghostcacher.units import format_bytes

_CHARACTERS_PER_TOKEN = 12


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("calibrate")(calibrate)


def calibrate(
    model: Annotated[
        str | None, typer.Argument(help="A hub model or a folder; the packaged 135M model if left out.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="A text like those that will be cached; some of each kind.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--directory", "-d", help="The store; default: $GHOSTCACHER_HOME.")
    ] = None,
    remote: Annotated[str | None, typer.Option(help="A remote store that shall have the tables too.")] = None,
    dtype: Annotated[str, typer.Option(help="As the model will be loaded: tables are of its weights.")] = "auto",
    prefix_tokens: Annotated[int, typer.Option(help="How much of each text is a prefix; 256 more are scored.")] = 1024,
    codec: Annotated[
        list[str] | None, typer.Option("--codec", help="Measure this one too, such as bnb_nf4 or your own.")
    ] = None,
    output: Annotated[Format, typer.Option("--format", "-f", help="What to print.")] = Format.human,
) -> None:
    """Learn the tables of codec kvt for a model (two minutes for 135M parameters on two cores), and keep them.

    What other codecs cost on the model is measured too: a store's stats say it of its tiers.
    """
    from ghostcacher.cli.demo_model import load
    from ghostcacher.research import COMPARED, SCORED_TOKENS, calibrate, steps_of
    from ghostcacher.tiers.opening import open_store

    sources = _read(text) if text else built_in()
    loaded = load(model, dtype=dtype)
    length = prefix_tokens + SCORED_TOKENS
    windows = [window for source in sources if (window := _window(loaded.tokenizer, source, length)) is not None]
    if not windows:
        fail(f"no text has {length} tokens; give longer ones with --text, or a smaller --prefix-tokens")
    codecs = tuple(dict.fromkeys((*COMPARED, *(codec or ()))))
    with open_store(directory, memory=None, remote=remote) as store:
        with tqdm(total=steps_of(len(windows), codecs), desc="calibrating", disable=None, leave=False) as bar:
            tables, weights = calibrate(
                loaded.model, windows, prefix_tokens=prefix_tokens, codecs=codecs, progress=lambda _: _advance(bar)
            )
        store.shelf.put(tables, weights)
    curve = [{"codec": f"kvt({step:g})", "kl": kl} for step, kl in tables.curve]
    costs = [{"codec": name, "kl": kl} for name, kl in tables.costs.items()]
    document = {"tables": tables.digest, "model": tables.model, "size_bytes": len(tables.blob), "curve": curve,
                "costs": costs}  # fmt: skip
    lines = [f"{point['codec']}: KL {point['kl']:.1e} nats a token" for point in (*curve, *costs)]
    kept = f"kept tables {tables.digest[:12]} of {tables.model}, {format_bytes(len(tables.blob))}"
    emit(output, document, "\n".join([kept, *lines]))


def _read(paths: list[Path]) -> list[str]:
    try:
        return [path.read_text() for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read a text: {error}")


def built_in() -> list[str]:
    """Prose and code that every Python installation has, in six windows of different kinds."""
    import inspect
    import tarfile
    from asyncio import base_events
    from email import message

    from ghostcacher.cli.demo_model import real_text

    prose, part = real_text(), 20_000
    return [
        prose[-6 * part : -5 * part], inspect.getsource(base_events), prose[-4 * part : -3 * part],
        prose[-2 * part : -part], inspect.getsource(tarfile)[2 * part :], inspect.getsource(message),
    ]  # fmt: skip


def _window(tokenizer: Any, source: str, tokens: int) -> Any:
    ids = tokenizer(source[: tokens * _CHARACTERS_PER_TOKEN], return_tensors="pt").input_ids[:, :tokens]
    return ids if ids.shape[1] == tokens else None


def _advance(bar: Any) -> None:
    bar.update(1)
