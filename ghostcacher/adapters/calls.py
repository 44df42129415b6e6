"""One forward call, as a hook sees it: what it asks for, when it may be served, how it is cut.

The rules come from running real clients; a call that breaks one runs cold, under the reason given here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ghostcacher.adapters.autocast import autocasts
from ghostcacher.adapters.media import MEDIA_ARGUMENTS, MEDIA_CONTENT, TYPE_ARGUMENTS, Media
from ghostcacher.adapters.positions import are_plain

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
_HARMLESS = frozenset({
    "input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "cache_position",
    "logits_to_keep", "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
    *CACHE_NAMES,
})  # fmt: skip
_CUT_ON_LAST_AXIS = ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids", "cache_position")
_MASK_2D = 2
_MASK_4D = 4


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one forward, by name. ``cache_name`` is the name under which the caller gave the cache.

    ``unsaid_logits`` is how many last logits the caller wants if ``logits_to_keep`` does not say. ``cuts_mask`` is
    whether a 2D mask is of the call's own columns, as models without attention take it, not of all columns seen.
    ``media`` is what was read of its images and videos.
    """

    arguments: Mapping[str, Any]
    cache_name: str
    cache: Cache
    input_ids: torch.Tensor
    unsaid_logits: int = 0
    cuts_mask: bool = False
    media: Media | None = None

    @property
    def has_media(self) -> bool:
        """Whether the call gives images or videos, read or not."""
        return any(not _says_nothing(self.arguments.get(name)) for name in MEDIA_CONTENT)

    @property
    def is_tokens(self) -> bool:
        """Whether the call gives ``[rows, tokens]`` ids and nothing in their place."""
        return self.input_ids.dim() == _MASK_2D and self.arguments.get("inputs_embeds") is None

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return int(self.input_ids.shape[0])

    @property
    def width(self) -> int:
        """Columns that the call adds."""
        return int(self.input_ids.shape[1])

    @property
    def kept_logits(self) -> int:
        """How many last positions the caller wants logits of; 0 means all."""
        keep = self.arguments.get("logits_to_keep")
        if keep is None:
            return self.unsaid_logits
        return keep if isinstance(keep, int) else 0

    def without_first(self, columns: int) -> dict[str, Any]:
        """The arguments with the first ``columns`` columns cut off; a 2D mask of all columns seen stays whole."""
        return self._cut(columns, self.width)

    def piece(self, first: int, last: int) -> dict[str, Any]:
        """The arguments of a forward over columns ``first`` to ``last`` alone; a 2D mask covers all up to there."""
        kept = self._cut(first, last)
        mask = kept.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == _MASK_2D and not self.cuts_mask:
            kept["attention_mask"] = mask[:, : mask.shape[1] - self.width + last]
        return kept

    def _cut(self, first: int, last: int) -> dict[str, Any]:
        kept, columns = dict(self.arguments), slice(first, last)
        for name in _CUT_ON_LAST_AXIS:
            if isinstance(kept.get(name), torch.Tensor):
                kept[name] = kept[name][..., columns]
        if self.media is not None:
            kept.update(self.media.between(first, last))
        mask = kept.get("attention_mask")
        if _is_prepared(mask):
            # It fits a cache that was empty: the model must build its own, from the padding alone.
            kept["attention_mask"] = mask = _real_columns(mask, self.width)
        if self.cuts_mask and isinstance(mask, torch.Tensor) and mask.dim() == _MASK_2D:
            kept["attention_mask"] = mask[:, mask.shape[1] - self.width :][:, columns]
        return kept


class CallReader:
    """Reads the calls of one module's ``forward``, positional arguments included.

    ``cache_name`` is the name under which that ``forward`` takes its cache (transformers 5.24 renamed it).
    """

    def __init__(self, module: Any) -> None:
        self._names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        self.takes_positions = "position_ids" in self._names
        self._remembers_positions = any(hasattr(part, "rope_deltas") for part in module.modules())
        self._takes_logits = "logits_to_keep" in self._names
        self.last_logits: Mapping[str, int] = {"logits_to_keep": 1} if self._takes_logits else {}
        self.cuts_masks = False
        self.cache_name = next((name for name in CACHE_NAMES if name in self._names), CACHE_NAMES[0])

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """The call, or None if it carries no cache of transformers with layers, or no input."""
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs} if args else kwargs
        for name in CACHE_NAMES:
            cache = arguments.get(name)
            if isinstance(cache, Cache) and hasattr(cache, "layers"):
                ids = arguments.get("input_ids")
                tokens = ids if isinstance(ids, torch.Tensor) else arguments.get("inputs_embeds")
                unsaid = self._unsaid_logits(arguments)
                if isinstance(tokens, torch.Tensor):
                    return Call(arguments, name, cache, tokens, unsaid, self.cuts_masks)
                return None
        return None

    def _unsaid_logits(self, arguments: Mapping[str, Any]) -> int:
        """Logits that a caller wants who does not say: all, or the last if the model has no name for it.

        ``generate`` is told from a loop of the user's own by ``return_dict=True``, which it always gives.
        """
        return int(not self._takes_logits and arguments.get("return_dict") is True)

    def is_positioned(self, call: Call) -> bool:
        """Whether the call, not an earlier one, decides its positions.

        Models with rope of several dimensions keep an offset of the latest media prompt, for calls that give none.
        """
        return not self._remembers_positions or call.arguments.get("position_ids") is not None


def why_not(call: Call, module: Any, *, takes_images: bool) -> str | None:
    """Why this call must run cold, or None. ``takes_images`` is whether prompts with images are served."""
    rules = (
        (not call.is_tokens, "inputs_embeds"),
        (torch.is_grad_enabled(), "gradients are on"),
        (bool(autocasts()), "autocast is on"),
        (_wants_insides(call, module.config), "hidden states or attentions are wanted"),
        (call.kept_logits < 1, "logits of the whole prompt are wanted"),
        (call.arguments.get("use_cache") is False, "use_cache=False"),
        (module.training and _changes_in_training(module), "training with dropout or gradient checkpointing"),
    )
    broken = next((reason for is_broken, reason in rules if is_broken), None)
    return broken or _unknown_argument(call, module.config, takes_images=takes_images)


def goes_on(call: Call, module: Any, *, takes_images: bool) -> bool:
    """Whether a call after a prompt computes as that did, and gives nothing but tokens of text.

    Waits for the device only for token types. Before transformers 5.24 multimodal types of the whole
    sequence come with every step: only longer calls are asked.
    """
    if autocasts() or not call.is_tokens or call.has_media:
        return False
    if _unknown_argument(call, module.config, takes_images=takes_images):
        return False
    names = TYPE_ARGUMENTS if call.width > 1 else TYPE_ARGUMENTS[:1]
    types = [call.arguments[name] for name in names if isinstance(call.arguments.get(name), torch.Tensor)]
    return not any(bool((each[..., -call.width :] != 0).any()) for each in types)


def _unknown_argument(call: Call, config: Any, *, takes_images: bool) -> str | None:
    known = _HARMLESS | MEDIA_ARGUMENTS if takes_images else _HARMLESS
    if not takes_images and not hasattr(config, "type_vocab_size"):
        # GPT-2 and its like embed even types of 0; BERT's take none for 0.
        known = known - set(TYPE_ARGUMENTS)
    given = (name for name, value in call.arguments.items() if not _says_nothing(value))
    unknown = next((name for name in given if name not in known), None)
    if unknown in MEDIA_ARGUMENTS:
        return f"images are not proven for this model type (argument {unknown!r})"
    return f"argument {unknown!r}" if unknown else None


def _says_nothing(value: object) -> bool:
    return value is None or value is False or (isinstance(value, dict) and not value)


def _wants_insides(call: Call, config: Any) -> bool:
    asked = ((call.arguments.get(name), name) for name in ("output_hidden_states", "output_attentions"))
    return any(getattr(config, name, False) if value is None else value for value, name in asked)


def padding(call: Call, past: int) -> tuple[int, ...] | None:
    """Columns of left padding of each row of the whole sequence, or None if the mask is anything else."""
    mask = call.arguments.get("attention_mask")
    if _is_prepared(mask) and past == 0:
        mask = _real_columns(mask, call.width)
    if mask is None:
        return (0,) * call.rows
    if not isinstance(mask, torch.Tensor) or mask.dim() != _MASK_2D or mask.shape[1] != past + call.width:
        return None
    real = mask != 0
    pads = (~real).sum(dim=1)
    is_left_only = torch.equal(real, torch.arange(mask.shape[1], device=mask.device)[None] >= pads[:, None])
    return tuple(pads.tolist()) if is_left_only and bool((pads < mask.shape[1]).all()) else None


def _is_prepared(mask: object) -> bool:
    """Whether ``mask`` is one, or one per type of layer, that ``generate`` prepared for a static cache."""
    masks = mask.values() if isinstance(mask, dict) else [mask] if mask is not None else []
    return bool(masks) and all(m is None or (isinstance(m, torch.Tensor) and m.dim() == _MASK_4D) for m in masks)


def _real_columns(mask: Any, width: int) -> torch.Tensor | None:
    """The 2D mask behind a prepared one: a column is real if any position may look at it; None if all are."""
    prepared = next((m for m in mask.values() if m is not None), None) if isinstance(mask, dict) else mask
    if prepared is None:
        return None
    seen = prepared if prepared.dtype == torch.bool else prepared == 0
    real = seen[:, 0, :, :width].any(dim=-2)
    return None if real.shape[1] == width and bool(real.all()) else real.long()


def has_plain_positions(call: Call, pads: tuple[int, ...], past: int) -> bool:
    """Whether ``position_ids``, if given, follow from the tokens and media of each row."""
    spans = call.media.spans if call.media else ()
    return are_plain(call.arguments.get("position_ids"), pads, past, call.width, spans)


def continues(call: Call, past: int) -> bool | None:
    """Whether the call goes on after ``past`` columns, rather than beginning a prompt; None if it does not say.

    A 2D mask covers everything seen, positions count from the prompt's beginning. May wait for the device.
    """
    mask = call.arguments.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == _MASK_2D:
        return int(mask.shape[1]) == past + call.width
    positions = call.arguments.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.numel():
        return int(positions.reshape(-1, positions.shape[-1])[0, 0]) >= past
    return None


def _changes_in_training(module: Any) -> bool:
    if any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
        return True
    has_layers = any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())
    config = module.config.to_dict()
    return has_layers or any("drop" in name and isinstance(p, float) and p > 0 for name, p in config.items())
