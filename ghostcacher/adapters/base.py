"""What the request path asks of a model: who it is, what its cache is made of, and what it must not be served."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from ghostcacher.adapters import autocast, offload, table
from ghostcacher.adapters.calls import CallReader
from ghostcacher.adapters.certify import certify, pads_change_rows
from ghostcacher.adapters.fingerprint import Weights, WeightsFingerprint
from ghostcacher.adapters.guard import Guard
from ghostcacher.adapters.identity import TRANSFORMERS_VERSION, identity_fields, text_config
from ghostcacher.adapters.kinds import kind_of
from ghostcacher.adapters.probe import Shape, shape_of
from ghostcacher.adapters.ranks import Ranks
from ghostcacher.adapters.rope import RopeRule, is_frequencies, rope_rule
from ghostcacher.adapters.state import CacheState, put_layers
from ghostcacher.adapters.static import static_state
from ghostcacher.adapters.unserved import UnservedError
from ghostcacher.adapters.walk import Activations, Walk, walk
from ghostcacher.config import StoreConfig
from ghostcacher.errors import UnsupportedModelError
from ghostcacher.gate import Line
from ghostcacher.keys import Namespace

_WITHOUT_ATTENTION = frozenset({"conv", "recurrent", "dummy"})
FingerprintMode = Literal["sampled", "always"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose state a forward computes: in ``namespace``, up to where ``activations`` say that adapters set in."""

    namespace: Namespace
    activations: Activations

    def shared_columns(self, width: int, rows: int) -> int | None:
        """Leading columns of ``rows`` rows of ``width`` in the namespace; None: all.

        Raises:
            UnservedError: there are activations for another number of rows.
        """
        if not any(self.activations):
            return None
        if len(self.activations) not in {1, rows}:
            raise UnservedError("activated LoRA for another number of rows")
        return width - min(width, max(last or 0 for last in self.activations))


class ModelAdapter:
    """One loaded model, seen by the cache. Holds no reference to the model: every method is given it."""

    def __init__(self, module: Any) -> None:
        """Looks at config and layer classes only; see `prepare` for what runs the model."""
        self.model_type: str = text_config(module).model_type
        self.reader = CallReader(module)
        self.refusal: str | None = why_refused(module.config)
        self.ranks: Ranks | None = None
        try:
            self.ranks = Ranks.of(module)
        except UnsupportedModelError as error:
            self.refusal = str(error)
        self.shape: Shape | None = None
        self.rope: RopeRule | None = rope_rule(text_config(module))
        self.goes_one_at_a_time = self.model_type in table.ONE_AT_A_TIME
        self.takes_images = module.config.model_type in table.WITH_IMAGES
        self.serves_padding = self.model_type not in table.NOT_IN_PADDED_BATCHES
        self.tokens_left = table.TOKENS_LEFT.get(self.model_type, 1)
        self.prefill = Line()
        self._is_ignored = is_frequencies if self.rope else None
        self._weights = WeightsFingerprint(self._is_ignored)
        self._is_prepared = False
        self._is_mixed = False
        self._identifying = threading.RLock()
        self._known_weights: tuple[Weights, tuple[Any, ...]] = (Weights("", ""), ())
        self._known_config: dict[str, Any] = {}
        self._known_fields: dict[str, Any] = {}
        self._known_namespaces: dict[tuple[int, str | None, str], Namespace] = {}
        module.register_load_state_dict_post_hook(_Expiring(self._weights))

    def prepare(self, module: Any) -> None:
        """Once: run a few tokens to learn the layout, certify a type outside the proven table, digest the weights.

        Sets `refusal` if anything fails; never raises.
        """
        if self._is_prepared or self.refusal:
            return
        self._is_prepared = True
        self._is_mixed = autocast.is_prepared(module)
        try:
            with autocast.no_autocast():
                self._probe(module)
            self.weigh(module)
        except UnsupportedModelError as error:
            self.refusal = str(error)
        except Exception as error:  # noqa: BLE001 (whatever a foreign model raises, its prompts run cold)
            self.refusal = f"a probe of the model failed ({type(error).__name__}: {error})"

    def _probe(self, module: Any) -> None:
        self.shape = shape_of(module)
        self.reader.cuts_masks = {kind.name for kind in self.shape.kinds} <= _WITHOUT_ATTENTION
        if self.model_type not in table.PROVEN:
            self.refusal = certify(module, self.shape, one_at_a_time=self.goes_one_at_a_time)
            self.serves_padding = self.refusal is None and not pads_change_rows(module, self.shape)
        if self.ranks is not None and self.has_states:
            self.refusal = "tensor parallel, and state that is valid at one length only"

    def identify(self, module: Any, config: StoreConfig, mode: FingerprintMode, tokens: int) -> Identity:
        """Everything that changes KV state, as the model stands now, for a prompt of ``tokens`` tokens.

        Raises:
            UnservedError: hooks on the model's layers, such as peft's for batches of mixed adapters, or adapters
                that do not say what they do; mixed precision since the model was looked at first; or a prompt so
                long that its state depends on others.
            ValueError: the weights cannot be read, or the model was not prepared.
        """
        if self.shape is None:
            raise ValueError("the model's cache layout is not known")
        if autocast.is_prepared(module) != self._is_mixed:
            raise UnservedError("prepared for mixed precision, or taken back, since it was first looked at")
        found = walk(module, self._is_ignored)
        if found.is_hooked:
            raise UnservedError("hooks on the model's layers")
        if found.unknown:
            raise UnservedError(f"peft parts of class {found.unknown}")
        if any(found.activations) and self.has_states:
            raise UnservedError("activated LoRA, and state that is valid at one length only")
        with self._identifying:  # a namespace is one with the weights it was made of, whichever thread asks
            namespace = self._namespace(module, self.shape, found, config, tokens, always=mode == "always")
        return Identity(namespace, found.activations)

    def _namespace(
        self, module: Any, shape: Shape, found: Walk, config: StoreConfig, tokens: int, *, always: bool
    ) -> Namespace:
        weights = self.weigh(module, found.tensors, always=always)
        config_now = vars(text_config(module))
        if (weights, found.adapters) != self._known_weights or config_now != self._known_config:
            self._known_weights, self._known_config = (weights, found.adapters), copy.deepcopy(config_now)
            self._known_fields = identity_fields(module, weights.base, shape.layout.digest)
            if self.ranks is not None:
                self._known_fields["tensor_parallel"] = self.ranks.identity
            if shape.autocasts:
                self._known_fields["autocasts"] = list(shape.autocasts)
            if found.adapters:
                self._known_fields["adapters"] = [weights.adapters, *found.adapters]
            self._known_namespaces = {}
        regime = self.rope.regime(tokens) if self.rope else ""
        tenant = (config.block_tokens, config.salt, regime)
        if tenant not in self._known_namespaces:
            fields = {**self._known_fields, "block_tokens": config.block_tokens, "salt": config.salt, "rope": regime}
            self._known_namespaces[tenant] = Namespace.of(fields)
        return self._known_namespaces[tenant]

    def weigh(self, module: Any, tensors: Sequence[torch.Tensor] | None = None, *, always: bool = False) -> Weights:
        """The digests of the weights as they are now, noted in the layout for codecs that know the model by them."""
        found = walk(module, self._is_ignored).tensors if tensors is None else tensors
        weights = self._weights.current(module, found, always=always)
        if self.shape is not None and self.shape.layout.weights != weights.base:
            self.shape = replace(self.shape, layout=replace(self.shape.layout, weights=weights.base))
        return weights

    @property
    def has_states(self) -> bool:
        """Whether any layer has state that is valid at one length only."""
        return self.shape is not None and bool(self.shape.layout.snapshot_groups)

    def guard(self, module: Any) -> Guard | None:
        """What runs ``module`` again beside others who use it; None if its forward changes anything but the cache.

        Dynamic rope writes its frequencies, models with images their offsets, accelerate moves offloaded weights. The
        ranks of a tensor-parallel model would have to run it at the same time.
        """
        is_plain = self.ranks is None and not (
            self.has_states or self.rope or self.takes_images or self.goes_one_at_a_time
        )
        if self.shape is None or not is_plain or self.tokens_left > 1 or offload.is_offloaded(module):
            return None
        return Guard(module, self.shape)

    def storable_columns(self, tokens: int, pads: int) -> int | None:
        """Up to which column the state of a prompt of ``tokens`` tokens may be stored; None: everywhere.

        What a decode path that rounds unlike the prefill path computes is not stored.
        """
        limit = self.rope.storable_tokens(tokens) if self.rope else None
        if self.tokens_left > 1:
            limit = tokens if limit is None else min(limit, tokens)
        return None if limit is None else pads + limit

    def state_of(self, cache: Cache) -> CacheState | None:
        """The state over the cache's layers, made ours if they are empty; None if they are of another kind."""
        shape, layers = self.shape, cache.layers
        if shape is None or getattr(cache, "offloading", False):
            return None
        if isinstance(cache, StaticCache):
            return static_state(layers, shape.kinds)
        classes = [type(layer) for layer in layers]
        if classes != shape.classes:
            is_lazy = not layers and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer
            is_stock = classes == shape.stock_classes and all(kind_of(layer).is_empty(layer) for layer in layers)
            if not is_lazy and not is_stock:
                return None
            put_layers(layers, shape.made_from(layers) if is_stock else shape.blank())
        return shape.state_of(layers)


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


def why_refused(config: Any) -> str | None:
    """Why prompts of models with this config run cold, as far as it says, or None."""
    decoder = config.get_text_config(decoder=True)
    for model_type in (config.model_type, decoder.model_type):
        if why := table.refusal(model_type, TRANSFORMERS_VERSION):
            return f"{model_type}: {why}"
    if getattr(decoder, "use_bidirectional_attention", None) not in {None, False, "vision"}:
        return "attention looks both ways"
    try:
        for layer in DynamicCache(config=config).layers:
            kind_of(layer)
    except UnsupportedModelError as error:
        return str(error)
    return None
