"""Tiny models that look at images, and prompts for them: random pixels, placeholders where a processor puts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from ghostcacher.testing.models import tiny_model

IMAGE_TOKEN = 100
VIDEO_TOKEN = 101
IMAGE_TOKENS = 4
"""Placeholder tokens per image."""

IMAGE_START = 104
"""What some processors put before each image; models that ask for it are configured with it."""

_IDS: Mapping[str, int] = {
    "image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": IMAGE_START, "vision_end_token_id": 105,
}  # fmt: skip
_PIXELS = 56
_PATCH = 14
_ROPE_3D: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_TEXT_3D: Mapping[str, Any] = {"rope_parameters": _ROPE_3D}

IMAGE_RECIPES: Mapping[str, Mapping[str, Any]] = {
    "llava": {"vision_config": {"image_size": 28}},
    "gemma3": {
        "mm_tokens_per_image": IMAGE_TOKENS, "vision_config": {"image_size": 28},
        "text_config": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    },
    "gemma4": {
        "vision_config": {
            "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4,
            "pooling_kernel_size": 2, "position_embedding_size": 64,
        },
        "text_config": {
            "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "use_bidirectional_attention": "vision",
        },
    },
    "idefics3": {"scale_factor": 2, "vision_config": {"image_size": _PIXELS}},
    "smolvlm": {"scale_factor": 2, "vision_config": {"image_size": _PIXELS}},
    "internvl": {"vision_config": {"image_size": [_PIXELS, _PIXELS], "patch_size": [_PATCH, _PATCH]}},
    "qwen2_vl": {"text_config": _TEXT_3D, "vision_config": {"hidden_size": 64}},
    "qwen2_5_vl": {
        "text_config": _TEXT_3D,
        "vision_config": {"out_hidden_size": 64, "fullatt_block_indexes": [0], "window_size": 56},
    },
    "qwen3_vl": {
        "text_config": {"rope_parameters": {**_ROPE_3D, "mrope_interleaved": True}},
        "vision_config": {
            "out_hidden_size": 64, "deepstack_visual_indexes": [0], "patch_size": _PATCH, "num_position_embeddings": 64,
        },
    },
    "qwen3_5": {
        "text_config": {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "rope_parameters": {**_ROPE_3D, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        },
        "vision_config": {
            "out_hidden_size": 64, "patch_size": _PATCH, "num_position_embeddings": 64,
        },
    },
}  # fmt: skip
"""What the configs of these types need beyond the base."""

_FLAT_PATCHES = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"})
_IMAGES_BY_ROW = frozenset({"idefics3", "smolvlm"})


def tiny_image_model(model_type: str, **options: Any) -> Any:
    """A random model of `IMAGE_RECIPES`, of the size of `tiny_model`."""
    blank = AutoConfig.for_model(model_type)
    ids: dict[str, Any] = {name: value for name, value in _IDS.items() if hasattr(blank, name)}
    return tiny_model(model_type, auto=AutoModelForImageTextToText, **IMAGE_RECIPES[model_type], **ids, **options)


def random_image(seed: int) -> torch.Tensor:
    """One image ``[3, height, width]`` of random pixels, on torch's default device; the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((3, _PIXELS, _PIXELS), generator=generator, device="cpu").to(torch.get_default_device())


def image_inputs(model: Any, rows: Sequence[Sequence[int | torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What a processor makes of prompts that are lists of token ids and images ``[3, height, width]``.

    Rows of unequal length are padded on the left.
    """
    model_type = model.config.model_type
    texts = [_with_placeholders(row) for row in rows]
    width = max(len(text) for text in texts)
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    inputs = {"input_ids": ids, "attention_mask": mask}
    pictures = [[part for part in row if isinstance(part, torch.Tensor)] for row in rows]
    if any(pictures):
        inputs.update(_media(model_type, pictures))
    types = (ids == IMAGE_TOKEN).long()
    if model_type == "gemma3":
        inputs["token_type_ids"] = types
    if model_type in _FLAT_PATCHES or model_type == "gemma4":
        inputs["mm_token_type_ids"] = types
    return inputs


def _media(model_type: str, pictures: Sequence[Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
    images = torch.stack([image for row in pictures for image in row])
    if model_type in _FLAT_PATCHES:
        side = _PIXELS // _PATCH
        patches = images.unfold(2, _PATCH, _PATCH).unfold(3, _PATCH, _PATCH).permute(0, 2, 3, 1, 4, 5)
        flat = patches.reshape(-1, 3, 1, _PATCH * _PATCH).expand(-1, 3, 2, _PATCH * _PATCH)
        grid = torch.tensor([[1, side, side]] * len(images))
        return {"pixel_values": flat.reshape(flat.shape[0], -1), "image_grid_thw": grid}
    if model_type in _IMAGES_BY_ROW:
        return {"pixel_values": torch.stack([torch.stack(list(row)) for row in pictures])}
    if model_type == "gemma4":
        small = images[:, :, :16, :16].unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
        spots = torch.tensor([[x, y] for y in range(4) for x in range(4)])
        return {
            "pixel_values": small.reshape(len(images), 16, -1),
            "image_position_ids": spots.expand(len(images), -1, -1),
        }
    if model_type in {"llava", "gemma3"}:
        return {"pixel_values": images[:, :, :28, :28]}
    return {"pixel_values": images}


def _with_placeholders(row: Sequence[int | torch.Tensor]) -> list[int]:
    ids: list[int] = []
    for part in row:
        ids += [IMAGE_TOKEN] * IMAGE_TOKENS if isinstance(part, torch.Tensor) else [part]
    return ids
