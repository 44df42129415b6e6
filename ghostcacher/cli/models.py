"""``ghostcacher models``: what is reused of each model type."""

from __future__ import annotations

from typing import Annotated

import typer

from ghostcacher.cli.output import Format, emit, fail, table


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("models")(models)


def models(
    matching: Annotated[str, typer.Argument(help="Only types whose name holds this.")] = "",
    output: Annotated[Format, typer.Option("--format", "-f", help="What to print.")] = Format.human,
) -> None:
    """List every causal model type of the installed transformers: proven, certified at first use, or refused."""
    import transformers

    from ghostcacher.support import known_types

    transformers.utils.logging.set_verbosity_error()
    found = [support for support in known_types() if matching in support.model_type]
    if not found:
        fail(f"no causal model type of transformers {transformers.__version__} has {matching!r} in its name")
    rows: list[list[object]] = []
    for support in found:
        kinds = ", ".join(dict.fromkeys(support.layers))
        is_refused = support.status == "refused"
        rows.append([support.model_type, support.status, "" if is_refused else support.capability,
                     support.reason if is_refused else kinds])  # fmt: skip
    human = table(["type", "status", "reused at", "layers, or why not"], rows)
    emit(output, {"transformers": transformers.__version__, "models": found}, human)
