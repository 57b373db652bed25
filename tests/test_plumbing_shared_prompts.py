"""Reading a prompt once for all its completions must change nothing but the time."""

import pytest
import torch
from helpers import tiny_model
from transformers import Gemma2Config, Gemma2ForCausalLM

import common
from plumbing.shared_prompts import saves_tokens

# Three prompts of different lengths; completions of one token, of several, and of different lengths in one group.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15], [5, 6, 7, 8, 9, 10]]
COMPLETIONS = [[20, 21, 22], [23], [24, 25], [26], [27, 28, 29, 30], [31, 32], [33, 34, 35], [36], [37, 38]]


def batch():
    """Rollouts of three prompts with three completions each."""
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    return common.assemble(prompts, COMPLETIONS, pad=0, device="cpu")


def logps_and_gradients(model, monkeypatch, share, layer=None, norm=False, rows=range(9)):
    """Log-probs of the batch's rows, and the gradient that a weighted sum of them has for every parameter."""
    used = []

    def decide(*arguments):
        used.append(share and saves_tokens(*arguments))
        return used[-1]

    monkeypatch.setattr(common, "saves_tokens", decide)
    model.zero_grad()
    logps, entropy = common.completion_logps(model, batch(), list(rows), 0.7, layer, norm)
    weights = torch.arange(logps.numel()).view(logps.shape).double().cos()
    ((logps + 0.3 * entropy) * weights).sum().backward()
    assert used == [share]
    return logps, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("layer, norm", [(None, False), (1, False), (0, True)])
def test_prompts_read_once_give_the_same_log_probs_and_gradients(family, layer, norm, monkeypatch):
    model = tiny_model(family, tied=False).double()
    plain, plain_gradients = logps_and_gradients(model, monkeypatch, False, layer, norm)
    shared, shared_gradients = logps_and_gradients(model, monkeypatch, True, layer, norm)
    assert torch.allclose(plain, shared, atol=1e-10, rtol=0)
    for name, gradient in plain_gradients.items():
        if gradient is None:
            assert shared_gradients[name] is None, name  # a block above the trained one stays as it is
        else:
            gap = (gradient - shared_gradients[name]).norm() / gradient.norm()
            assert gap < 1e-6, name  # transformers' norms compute in fp32, whatever the weights are


def test_rows_of_one_group_or_out_of_order_keep_their_places(monkeypatch):
    model = tiny_model().double()
    for rows in ([2, 0, 1], [6, 8, 7, 0, 2, 1]):
        plain, _ = logps_and_gradients(model, monkeypatch, False, rows=rows)
        shared, _ = logps_and_gradients(model, monkeypatch, True, rows=rows)
        assert torch.allclose(plain, shared, atol=1e-10, rtol=0)


def saves(model, rows):
    rollouts = batch()
    attention_mask = rollouts.attention_mask[rows]
    prompt_lengths = (attention_mask.sum(1) - rollouts.lengths[rows]).tolist()
    return saves_tokens(model, rollouts.ids[rows], attention_mask, prompt_lengths)


def test_it_is_done_only_where_it_saves_tokens():
    model = tiny_model()
    assert saves(model, list(range(9)))
    assert not saves(model, [0, 3, 6])  # three different prompts
    assert saves(model, [3, 5])  # 4 of 11 tokens
    assert not saves(model, [3, 5, 0, 8])  # 4 of 29: less than a quarter


def test_it_is_left_where_it_would_change_something():
    hybrid = tiny_model("qwen3_next")  # blocks that keep a state instead of keys
    assert not saves(hybrid, list(range(9)))
    checkpointing = tiny_model()
    checkpointing.gradient_checkpointing_enable()
    assert saves(checkpointing, list(range(9)))
    assert not saves(checkpointing.train(), list(range(9)))  # the cache would be dropped without a word
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8)
    windows = Gemma2ForCausalLM(Gemma2Config(vocab_size=103, num_key_value_heads=1, **size))
    assert not saves(windows, list(range(9)))  # some blocks see only the newest tokens
