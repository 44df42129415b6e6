"""Tiny random models, built from configs in milliseconds, whose attention is far from uniform."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ghostcacher.testing.recipes import (
    BASE,
    FULL_ATTENTION,
    OTHERS,
    RECIPES,
    VISION,
    VOCABULARY,
    Fields,
)

__all__ = ["FULL_ATTENTION", "RECIPES", "VOCABULARY", "random_prompt", "tiny_config", "tiny_model"]


def tiny_model(
    recipe: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    auto: Any = AutoModelForCausalLM,
    **overrides: Any,
) -> Any:
    """A random causal model with 4 layers of width 64 and 128 tokens, in ``eval`` mode.

    ``recipe`` is a model type or a key of `RECIPES`. Equal arguments give equal weights. ``auto`` builds the model
    from its config, on torch's default device.
    """
    config = tiny_config(recipe, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=dtype)
        _spread(model)
    return model.eval()


def tiny_config(recipe: str, **overrides: Any) -> Any:
    """The config of `tiny_model`. Base values are given only where the config, or a part of it, has such a field.

    Raises:
        ValueError: this transformers has no such model type.
    """
    model_type = recipe.partition(" ")[0]
    blank = AutoConfig.for_model(model_type)
    own = {**RECIPES.get(recipe, {}), **OTHERS.get(recipe, {}), **overrides}
    parts: dict[str, Any] = {}
    if (text := getattr(blank, "text_config", None)) is not None:
        parts["text_config"] = {**_known(text, BASE), **own.pop("text_config", {})}
    if (vision := getattr(blank, "vision_config", None)) is not None:
        parts["vision_config"] = {**_known(vision, VISION), **own.pop("vision_config", {})}
    return AutoConfig.for_model(model_type, **{**_known(blank, BASE), **parts, **own})


def random_prompt(tokens: int, *, seed: int = 0, rows: int = 1) -> torch.Tensor:
    """Random token ids ``[rows, tokens]``, none of them padding: the same on whatever is torch's default device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (rows, tokens), generator=generator, device="cpu")
    return ids.to(torch.get_default_device())


def _known(config: Any, fields: Fields) -> dict[str, Any]:
    names = set(config.to_dict()) | set(getattr(type(config), "attribute_map", {}))
    return {name: value for name, value in fields.items() if name in names}


def _spread(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, min(0.5, 1.2 / parameter.shape[-1] ** 0.5))
