"""Printing: for people, or as JSON and nothing else."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

USAGE = 2
PIPED_COLUMNS = 200
"""Width of a table that goes into a pipe or file: nothing may be cut off there."""


class Format(StrEnum):
    """What ``--format`` takes."""

    human = "human"
    json = "json"


def emit(output: Format, document: object, human: str | Table) -> None:
    """Print ``document`` as JSON or ``human`` as it is, on standard output."""
    if output is Format.json:
        sys.stdout.write(json.dumps(document, default=_plain) + "\n")
    else:
        width = None if sys.stdout.isatty() else PIPED_COLUMNS
        Console(highlight=False, width=width).print(human, soft_wrap=isinstance(human, str), markup=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A plain table; figures are set to the right, the last column wraps."""
    made = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        is_figure = bool(rows) and all(isinstance(row[number], int | float) for row in rows)
        made.add_column(column, justify="right" if is_figure else "left", no_wrap=number + 1 < len(columns))
    for row in rows:
        made.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    return made


def fail(message: str) -> NoReturn:
    """One sentence on standard error, exit code 2."""
    sys.stderr.write(f"ghostcacher: {message}\n")
    raise SystemExit(USAGE)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
