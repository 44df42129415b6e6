"""A tokenizer of words that name token ids of the tiny models, and the text that gives a prompt."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ghostcacher.testing.models import VOCABULARY

_BEGIN = "<s>"


def word_tokenizer(*, begins: bool = False, **special: str | list[str]) -> Any:
    """``w7`` is token 7; with ``begins``, token 1 is put in front. ``special`` are further special tokens."""
    made = Tokenizer(WordLevel({_BEGIN: 1} | {f"w{token}": token for token in range(2, VOCABULARY)}, unk_token=_BEGIN))
    made.pre_tokenizer = Whitespace()
    if begins:
        made.post_processor = TemplateProcessing(single=f"{_BEGIN} $A", special_tokens=[(_BEGIN, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def words_of(prompt: torch.Tensor) -> str:
    """The text of ``prompt`` ``[1, tokens]``."""
    return " ".join(f"w{token}" for token in prompt[0].tolist())
