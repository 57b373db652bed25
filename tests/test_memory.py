"""Memory: the plan of tests/bench_memory.py is right, and what the head keeps does not grow with the vocabulary."""

import importlib
import itertools
import weakref

import pytest
import torch
from bench_memory import COMPONENTS, SHAPES, checks, plan
from conftest import arguments, tiny_model

import common


@pytest.mark.parametrize("n", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_the_plan_is_what_live_tensors_take(n):
    """A plan that is off sends people to rent a card that is too small, or one that costs twice as much."""
    for name, planned, measured in itertools.islice(checks(), n):
        for component in COMPONENTS:
            assert planned[component] == pytest.approx(measured[component], rel=0.15), (name, component)


def test_the_plan_moves_with_the_options_as_memory_does():
    """Each of these options is on the command line to save memory: the one component it is for must fall."""
    config, base = SHAPES["Qwen3-4B"], plan(SHAPES["Qwen3-4B"], common.RunArgs())
    host = plan(config, common.RunArgs(optimizer_device="cpu"))
    assert host["optimizer"] == 0 and host["total"] == pytest.approx(base["total"] - base["optimizer"])
    assert plan(config, common.RunArgs(max_rollout_tokens=2**16))["cache"] < 0.3 * base["cache"]
    for options in (dict(micro_batch_tokens=2**15), dict(gradient_checkpointing=False)):
        assert plan(config, common.RunArgs(**options))["activations"] > 1.5 * base["activations"]
    # 16 bytes a parameter: two for the weight, two for its gradient, four for the master, eight for the moments
    assert sum(base[name] for name in ("weights", "gradients", "optimizer")) == pytest.approx(16 * 4.02e9 / 2**30, 0.01)


def kept_for_backward(V, tokens=256):
    """Bytes that token_logps keeps until the backward pass; storages count once, parameters not at all."""
    model, kept = tiny_model(vocab_size=V), {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.randn(1, tokens, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = common.token_logps(model, hidden, torch.zeros(1, tokens, dtype=torch.long))
    assert all(output.requires_grad for output in outputs)
    return sum(kept.values())


def test_log_probs_keep_their_inputs_only():
    """Whatever is kept per token and word is gigabytes at 152,000 words; hidden states and targets are not."""
    assert kept_for_backward(32000) == kept_for_backward(1000) <= 256 * (32 * 4 + 8)


@pytest.mark.parametrize("name", ["grpo", "bupo", "opo", "em", "sft"])
def test_what_is_only_logged_holds_no_graph_during_backward(name, model_folder, data, monkeypatch):
    """The head is recomputed in chunks for the backward pass. An entropy that nobody differentiates but somebody still
    holds keeps what was recomputed of every chunk: two fp32 [tokens, V], 20 GB for Qwen3 at the defaults."""
    script, held = importlib.import_module(name), []
    real_logps, real_loss = common.completion_logps, script.loss

    def completion_logps(*args, **kwargs):
        pair = real_logps(*args, **kwargs)
        held[:] = map(weakref.ref, pair)
        return pair

    def loss(*args):
        unused = held[0 if name == "em" else 1]()
        assert held[1 if name == "em" else 0]() is args[0]
        assert unused is None or not unused.requires_grad
        return real_loss(*args)

    monkeypatch.setattr(common, "completion_logps", completion_logps)
    monkeypatch.setattr(script, "loss", loss)
    source = model_folder.parent / "trajectories.jsonl" if name == "sft" else data
    script.main(arguments(script, model_folder, source))
    assert held
