"""The growing cache: the same keys and values as one that is copied for every token, in bounded memory."""

import torch
from helpers import TOKENIZER, tiny_model

import common
from plumbing.kv_cache import GrowingLayer, growing_cache

HEADS, WIDTH = 2, 4


def tokens_held(tensor):
    """Tokens, rows times columns, for which the memory behind keys or values has room."""
    return tensor.untyped_storage().nbytes() / (4 * HEADS * WIDTH)


def filled(room, rows=3, columns=500):
    """(layer, states [rows, heads, columns, width]): the states are its keys, and negated its values."""
    layer = GrowingLayer(room)
    states = torch.randn(rows, HEADS, columns, WIDTH)
    for token in states.split(1, dim=2):
        layer.update(token, -token)
    return layer, states


def test_it_grows_in_place():
    """torch.cat copies every earlier key and value for each new token: work that is quadratic in the length."""
    room = 3 * 540  # tokens, rows times columns
    layer = GrowingLayer(room)
    states = torch.randn(3, HEADS, 500, WIDTH)
    buffers = []
    for t, token in enumerate(states.split(1, dim=2), 1):
        keys, values = layer.update(token, -token)
        assert torch.equal(keys, states[:, :, :t])
        assert torch.equal(values, -keys)
        buffers.append(keys)  # held, so that no address is used twice
        reserve = 3 * (t / 8 + 17)
        assert tokens_held(keys) <= min(3 * t + reserve, room)
    assert len({keys.data_ptr() for keys in buffers}) < 20


def test_finished_rows_leave_and_the_others_keep_their_reserve():
    room = 3 * 540
    layer, states = filled(room)
    layer.batch_select_indices(torch.tensor([2, 0]))
    before = layer.keys.data_ptr()
    new = states[[2, 0], :, :7]
    keys, values = layer.update(new, -new)  # several tokens at once, too
    assert torch.equal(keys, torch.cat([states[[2, 0]], new], 2))
    assert torch.equal(values, -keys)
    assert keys.data_ptr() == before and tokens_held(keys) <= room * 2 / 3


def test_more_rows_take_no_reserve_along():
    """Samples of a prompt share what was read of it: each gets a copy, and no empty columns behind it."""
    layer, states = filled(3 * 540, columns=20)
    layer.batch_select_indices(torch.tensor([1, 0, 1, 2]))
    assert torch.equal(layer.keys, states[[1, 0, 1, 2]])
    assert tokens_held(layer.keys) == 4 * 20


def test_sliding_windows_keep_their_own_cache(monkeypatch):
    """Half of a model's blocks may look no further than a window: their cache is small, and must stay so."""
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2)
    kinds = [type(layer) is GrowingLayer for layer in growing_cache(model, room=100).layers]
    assert kinds == [True, True, False, False]
    held = []
    real = common.run_blocks

    def run_blocks(model, ids, attention_mask, cache=None):
        hidden = real(model, ids, attention_mask, cache)
        held.append([layer.keys.shape[2] for layer in cache.layers])
        return hidden

    with monkeypatch.context() as patch:
        patch.setattr(common, "run_blocks", run_blocks)
        prompts = [[7, 30, 50], [40], [11, 12, 13, 14, 15, 16]]
        rollouts = common.sample(model, TOKENIZER, prompts, 4, 20, seed=1)
    assert held[-1][0] > 15
    assert max(held[-1][2:]) < 6
    with torch.no_grad():
        logps, _ = common.completion_logps(model, rollouts, range(12), 1.0)
    assert (logps - rollouts.logps).abs().max() < 1e-5
