"""The command ``ghostcacher``."""

from __future__ import annotations


def main() -> None:
    """Run the command line; the process exits with 0, 1 (problems found) or 2 (wrong usage)."""
    from ghostcacher.cli.app import run

    run()
