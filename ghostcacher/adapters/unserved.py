"""How a rule of the adapters says that a prompt must run cold."""

from __future__ import annotations


class UnservedError(Exception):
    """A prompt must run cold; the message is the reason."""
