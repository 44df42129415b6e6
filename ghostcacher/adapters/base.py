"""What the request path asks of a model: who it is, what its cache is made of, and what it must not be served."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ghostcacher.adapters import table
from ghostcacher.adapters.calls import CallReader
from ghostcacher.adapters.certify import certify
from ghostcacher.adapters.fingerprint import WeightsFingerprint
from ghostcacher.adapters.full import is_full
from ghostcacher.adapters.identity import TRANSFORMERS_VERSION, identity_fields, rope_types, text_config
from ghostcacher.adapters.layers import GrowingLayer
from ghostcacher.adapters.probe import Shape, shape_of
from ghostcacher.adapters.walk import walk
from ghostcacher.config import StoreConfig
from ghostcacher.errors import UnsupportedModelError
from ghostcacher.keys import Namespace

FingerprintMode = Literal["sampled", "always"]


class ModelAdapter:
    """One loaded model, seen by the cache. Holds no reference to the model: every method is given it."""

    def __init__(self, module: Any) -> None:
        """Looks at config and layer classes only; see `prepare` for what runs the model."""
        self.model_type: str = text_config(module).model_type
        self.reader = CallReader(module)
        self.refusal: str | None = _why_refused(module)
        self.shape: Shape | None = None
        self._weights = WeightsFingerprint()
        self._is_prepared = False
        self._known_weights = ""
        self._known_config: dict[str, Any] = {}
        self._known_fields: dict[str, Any] = {}
        self._known_namespaces: dict[tuple[int, str | None], Namespace] = {}
        module.register_load_state_dict_post_hook(_Expiring(self._weights))

    def prepare(self, module: Any) -> None:
        """Once: run one token to learn the layout, certify a type outside the proven table, digest the weights.

        Sets `refusal` if anything fails; never raises.
        """
        if self._is_prepared or self.refusal:
            return
        self._is_prepared = True
        try:
            self.shape = shape_of(module)
            if self.model_type not in table.PROVEN:
                self.refusal = certify(module, self.shape)
            self._weights.current(module, walk(module).tensors)
        except Exception as error:  # noqa: BLE001 (whatever a foreign model raises, its prompts run cold)
            self.refusal = f"a probe of the model failed ({type(error).__name__}: {error})"

    def namespace(self, module: Any, config: StoreConfig, mode: FingerprintMode) -> Namespace:
        """Identity of everything that changes KV state, as the model stands now.

        Raises:
            UnservedError: hooks on the model's layers, or peft adapters: what they do to its state cannot be known.
            ValueError: the weights cannot be read, or the model was not prepared.
        """
        if self.shape is None:
            raise ValueError("the model's cache layout is not known")
        found = walk(module)
        if found.is_hooked:
            raise UnservedError("hooks on the model's layers")
        if found.has_adapters:
            raise UnservedError("peft adapters in the model")
        weights = self._weights.current(module, found.tensors, always=mode == "always")
        config_now = vars(text_config(module))
        if weights != self._known_weights or config_now != self._known_config:
            self._known_weights, self._known_config = weights, copy.deepcopy(config_now)
            self._known_fields = identity_fields(module, weights, self.shape.layout.digest)
            self._known_namespaces = {}
        tenant = (config.block_tokens, config.salt)
        if tenant not in self._known_namespaces:
            fields = {**self._known_fields, "block_tokens": config.block_tokens, "salt": config.salt}
            self._known_namespaces[tenant] = Namespace.of(fields)
        return self._known_namespaces[tenant]

    def growing_layers(self, cache: DynamicCache) -> Sequence[GrowingLayer] | None:
        """The cache's layers, made to grow in place if they are empty; None if they are of another kind."""
        if self.shape is None:
            return None
        layers = cache.layers
        if not layers and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
            layers.extend(GrowingLayer() for _ in self.shape.layout.layers)
        is_known = len(layers) == len(self.shape.layout.layers) and all(is_full(layer) for layer in layers)
        if not is_known or getattr(cache, "offloading", False):
            return None
        for number, layer in enumerate(layers):
            if not isinstance(layer, GrowingLayer):
                if layer.is_initialized:
                    return None
                layers[number] = GrowingLayer()
        found: Sequence[GrowingLayer] = layers
        return found


class UnservedError(Exception):
    """A prompt must run cold; the message is the reason."""


class _Expiring:
    """A load hook that survives being copied with the model: a copy is another model with a fingerprint of its own."""

    def __init__(self, weights: WeightsFingerprint | None = None) -> None:
        self._weights = weights

    def __call__(self, *_: object) -> None:
        if self._weights is not None:
            self._weights.expire()

    def __deepcopy__(self, memo: object) -> _Expiring:
        return _Expiring()

    def __reduce__(self) -> tuple[type[_Expiring], tuple[()]]:
        return (_Expiring, ())


def base_module(model: Any) -> Any:
    """The module whose ``forward`` takes ``input_ids``: compiled, parallel and peft wrappers taken off.

    Raises:
        UnsupportedModelError: there is no such module, or it is an encoder-decoder, or it takes no DynamicCache.
    """
    module = model
    while (inner := _unwrapped(module)) is not None:
        module = inner
    if not isinstance(module, nn.Module) or not hasattr(module, "config"):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model; pass one that has generate()")
    config: Any = module.config
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{config.model_type} is an encoder-decoder; ghostcacher serves decoders only")
    if why := table.NO_DYNAMIC_CACHE.get(config.model_type):
        raise UnsupportedModelError(f"{config.model_type} cannot be given a GhostCache: {why}")
    return module


def _unwrapped(module: Any) -> Any:
    if hasattr(module, "_orig_mod"):
        return module._orig_mod  # noqa: SLF001 (the name that torch.compile's wrapper documents)
    if hasattr(module, "get_base_model"):
        return module.get_base_model()
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.module
    return None


def _why_refused(module: Any) -> str | None:
    config: Any = module.config
    decoder = text_config(module)
    for model_type in (config.model_type, decoder.model_type):
        if why := table.refusal(model_type, TRANSFORMERS_VERSION):
            return f"{model_type}: {why}"
    if (getattr(module, "tp_size", None) or 1) > 1:
        return "tensor parallel: each rank holds other heads"
    if getattr(decoder, "use_bidirectional_attention", None):
        return "attention looks both ways"
    if ropes := rope_types(decoder) & table.LENGTH_DEPENDENT_ROPE:
        return f"rope type {min(ropes)!r} depends on the prompt's total length"
    others = sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers if not is_full(layer)})
    return f"layers of kind {', '.join(others)}" if others else None
