"""The fields of a namespace that a model decides."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

import transformers

_MAJOR, _MINOR = transformers.__version__.split(".")[:2]
TRANSFORMERS_VERSION = (int(_MAJOR), int(_MINOR))
_PATHS = frozenset({"_name_or_path", "_model_name_or_path", "transformers_version", "_commit_hash", "gguf_file"})


def text_config(module: Any) -> Any:
    """The config of the part that decodes text."""
    return module.config.get_text_config(decoder=True)


def whole_config(config: Any) -> Any:
    """Everything a model's config says, as JSON, but where its files lie."""
    return _plain({name: value for name, value in config.to_dict().items() if name not in _PATHS})


def identity_fields(module: Any, weights: str, layout: str) -> dict[str, Any]:
    """Weights, whole text config, dtype, weight quantization, attention, layout and transformers version.

    Where the files lie is left out: a model is what its tensors are.
    """
    config = text_config(module)
    return {
        "weights": weights,
        "config": whole_config(config),
        "dtype": str(getattr(module, "dtype", "")),
        "quantization": _quantization(module.config),
        "attention": str(getattr(config, "_attn_implementation", "")),
        "layout": layout,
        "transformers": list(TRANSFORMERS_VERSION),
    }


def _quantization(config: Any) -> Any:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    record = found.to_dict() if hasattr(found, "to_dict") else dict(found)
    return _plain({name: value for name, value in record.items() if name not in _PATHS})


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda v: str(v.value if isinstance(v, Enum) else v), sort_keys=True))
