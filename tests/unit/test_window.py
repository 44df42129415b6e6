"""`WindowLayer` against transformers' own layer: what attention sees, masks, cropping, and what is kept for storing."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from ghostcacher.adapters.layers import HEADROOM_TOKENS
from ghostcacher.adapters.window import WindowLayer

WINDOW = 8


def states(tokens, rows=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, tokens, 4, generator=generator), torch.randn(rows, 2, tokens, 4, generator=generator)


def pair(*steps):
    ours, stock = WindowLayer(WINDOW), DynamicSlidingWindowLayer(WINDOW)
    for number, tokens in enumerate(steps):
        keys, values = states(tokens, seed=number)
        assert ours.get_mask_sizes(tokens) == stock.get_mask_sizes(tokens)
        for mine, theirs in zip(ours.update(keys, values), stock.update(keys, values), strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(ours.keys, stock.keys)
        assert ours.get_seq_length() == stock.get_seq_length()
    return ours, stock


@pytest.mark.parametrize("steps", [(3, 2, 1), (7, 1, 1), (8, 1), (40, 1, 1, 9), (300, 300, 1), (1,) * 20])
def test_attention_sees_what_it_sees_without_us(steps):
    pair(*steps)


def test_history_holds_every_token():
    ours, _ = pair(40, 1, 5)
    keys = torch.cat([states(n, seed=s)[0] for s, n in enumerate((40, 1, 5))], 2)
    assert torch.equal(ours.history()["keys"], keys)
    assert ours.first_column == 0


def test_what_is_stored_is_let_go_of_except_the_window():
    ours, stock = pair(HEADROOM_TOKENS + 100)
    captured = ours.history()["keys"].clone()
    ours.freeze()
    ours.let_go(HEADROOM_TOKENS + 90)
    assert ours.first_column == HEADROOM_TOKENS + 90
    assert torch.equal(ours.keys, stock.keys)
    keys, values = states(1, seed=7)
    assert torch.equal(ours.update(keys, values)[0], stock.update(keys, values)[0])
    assert torch.equal(captured[:, :, -10:], ours.history()["keys"][:, :, :10])
    assert ours.holds_window_at(HEADROOM_TOKENS + 100)
    assert not ours.holds_window_at(HEADROOM_TOKENS + 90)


def test_frozen_columns_are_never_written_again():
    ours, _ = pair(40)
    view = ours.history()["keys"]
    before = view.clone()
    ours.freeze()
    ours.cut_to(20)
    ours.update(*states(20, seed=9))
    assert torch.equal(view, before)


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_crop_needs_no_recording(cut):
    ours, _ = pair(40)
    ours.crop(-cut)
    fresh = WindowLayer(WINDOW)
    keys, values = states(40, seed=0)
    fresh.update(keys[:, :, : 40 - cut], values[:, :, : 40 - cut])
    more = states(3, seed=5)
    assert torch.equal(ours.update(*more)[0], fresh.update(*more)[0])


def test_crop_beyond_what_is_held_says_so():
    ours, _ = pair(HEADROOM_TOKENS + 100)
    ours.let_go(HEADROOM_TOKENS + 100)
    with pytest.raises(RuntimeError, match="no longer held"):
        ours.crop(-50)


def test_rows_are_selected_repeated_and_continued():
    ours, stock = pair(20)
    for layer in (ours, stock):
        layer.batch_repeat_interleave(3)
        layer.reorder_cache(torch.tensor([2, 0, 1]))
        layer.batch_select_indices(torch.tensor([0, 2]))
    keys, values = states(2, rows=2, seed=3)
    assert torch.equal(ours.update(keys, values)[0], stock.update(keys, values)[0])


def test_gradients_take_the_stock_path():
    ours = WindowLayer(WINDOW)
    keys, values = states(4)
    keys.requires_grad_()
    assert ours.update(keys, values)[0].requires_grad
    with torch.no_grad():
        assert ours.update(*states(2, seed=1))[0].shape[-2] == 6
