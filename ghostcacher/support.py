"""What ghostcacher can do for a model, and for every model type that the installed transformers knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoConfig, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ghostcacher.adapters import table
from ghostcacher.adapters.base import ModelAdapter, base_module, why_refused
from ghostcacher.adapters.identity import TRANSFORMERS_VERSION
from ghostcacher.adapters.kinds import CONV, RECURRENT, kind_of
from ghostcacher.adapters.parts import Kind
from ghostcacher.blocks import LayerKind
from ghostcacher.errors import UnsupportedModelError
from ghostcacher.hooks import hooks_of

Capability = Literal["any length", "block ends", "snapshots", "none"]
Status = Literal["proven", "certified", "to be certified", "refused"]


@dataclass(frozen=True, slots=True)
class Support:
    """What is reused of one model type.

    ``layers`` is the kind of each cache layer, as far as known. ``capability`` is where a stored prefix may end: at
    any token; at block ends, at the prompt's end and where prompts part; or only where a snapshot was taken.
    ``status``: ``proven`` in this version's tests, ``certified`` by a probe of this very model, ``to be certified``
    by one at first use, or ``refused``: its prompts run cold, ``reason`` says why. ``images`` is whether prompts with
    images are served too.
    """

    model_type: str
    layers: tuple[LayerKind, ...]
    capability: Capability
    status: Status
    reason: str = ""
    images: bool = False

    def __str__(self) -> str:
        if self.status == "refused":
            return f"{self.model_type}: refused, {self.reason}"
        kinds = ", ".join(f"{self.layers.count(kind)} {kind}" for kind in dict.fromkeys(self.layers))
        images = ", images too" if self.images else ""
        return f"{self.model_type}: {self.status}, reused at {self.capability} ({kinds} layers){images}"


def supported(model: Any) -> Support:
    """What is reused of ``model``. The first call for a model probes it: about 50 tokens if its type is not proven.

    Never raises for a transformers model: what cannot be served is ``refused``.
    """
    try:
        module = base_module(model)
    except UnsupportedModelError as error:
        config = getattr(model, "config", None)
        return Support(getattr(config, "model_type", type(model).__name__), (), "none", "refused", str(error))
    hooks = hooks_of(module)
    hooks.prepare()
    return _of_adapter(hooks.adapter)


def known_types() -> Iterator[Support]:
    """Every causal language model type of the installed transformers, from its default config; builds no model."""
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        yield _of_type(model_type)


def _of_adapter(adapter: ModelAdapter) -> Support:
    kinds = adapter.shape.kinds if adapter.shape else ()
    layers = tuple(kind.name for kind in kinds)
    if adapter.refusal or not kinds:
        return Support(adapter.model_type, layers, "none", "refused", adapter.refusal or "not probed")
    status: Status = "proven" if adapter.model_type in table.PROVEN else "certified"
    return Support(adapter.model_type, layers, _capability(kinds), status, images=adapter.takes_images)


def _of_type(model_type: str) -> Support:
    if why := table.NO_DYNAMIC_CACHE.get(model_type) or table.refusal(model_type, TRANSFORMERS_VERSION):
        return Support(model_type, (), "none", "refused", why)
    config = AutoConfig.for_model(model_type)
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # the model's own file registers layer classes of its own
    if why := why_refused(config):
        return Support(model_type, (), "none", "refused", why)
    kinds = _kinds(config)
    status: Status = "proven" if config.get_text_config(decoder=True).model_type in table.PROVEN else "to be certified"
    layers, images = tuple(kind.name for kind in kinds), model_type in table.WITH_IMAGES
    return Support(model_type, layers, _capability(kinds), status, images=images)


def _kinds(config: Any) -> list[Kind]:
    """Kinds by class; of linear layers only the config says whether they are convolutional or recurrent."""
    named = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    kinds = [kind_of(layer) for layer in DynamicCache(config=config).layers]
    return [RECURRENT if kind is CONV and "conv" not in named else kind for kind in kinds]


def _capability(kinds: list[Kind] | tuple[Kind, ...]) -> Capability:
    states = [kind.states for kind in kinds if kind.states]
    if not states:
        return "any length"
    return "snapshots" if any(state.needs_pieces for state in states) else "block ends"
