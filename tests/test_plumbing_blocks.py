"""Which blocks are trained, and how fast: what is frozen stays bit for bit, every weight has the rate it was given."""

from types import SimpleNamespace

import pytest
import torch
from helpers import arguments, tiny_model
from safetensors.torch import load_file

import bupo
import grpo
import ppo
import sft
from plumbing.blocks import block_number, block_range, rate_factors, train_only
from plumbing.errors import UserError
from plumbing.optimizer import Optimizer
from plumbing.options import RunArgs


def moved(model_folder, run="run"):
    """Names of the weights that a run has changed by so much as a bit."""
    start = load_file(model_folder / "model.safetensors")
    trained = load_file(f"{run}/model.safetensors")
    assert start.keys() == trained.keys()
    return {name for name in start if not torch.equal(start[name], trained[name])}


def names_of_blocks(model_folder, *blocks):
    prefixes = tuple(f"model.layers.{k}." for k in blocks)
    return {name for name in load_file(model_folder / "model.safetensors") if name.startswith(prefixes)}


# ---------------------------------------------------------------------------------------------------------------------
# --train_blocks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_blocks, blocks", [("1:2", [1]), ("1:3", [1, 2])])
def test_everything_but_the_trained_blocks_stays_bit_for_bit(train_blocks, blocks, model_folder, data):
    """Decay, or moments of a former step, would move what no gradient reaches; so there are none. The end of the range
    is not trained, as in a slice."""
    settings = dict(train_blocks=train_blocks, weight_decay=0.1, gradient_checkpointing=True)
    grpo.main(arguments(grpo, model_folder, data, **settings))
    trained = names_of_blocks(model_folder, *blocks)
    assert moved(model_folder) == trained
    state = torch.load("run/optimizer.pt", weights_only=True)
    assert state.keys() == trained
    assert all(slot["adam"]["state"][0]["step"] == 2 for slot in state.values())


def test_imitation_trains_the_same_blocks(model_folder, data):
    """An option of every training script that one of them ignores."""
    trajectories = model_folder.parent / "trajectories.jsonl"
    settings = dict(eval_data=str(data), train_blocks="0:1")
    sft.main(arguments(sft, model_folder, trajectories, **settings))
    assert moved(model_folder) == names_of_blocks(model_folder, 0)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embedding_head_and_final_norm_are_frozen(tied, capsys):
    """A head that is tied to the embedding is one matrix with it, and a third of a small model."""
    model = tiny_model(tied=tied)
    train_only(model, "1:3")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(("model.layers.1.", "model.layers.2.")), name
    trained = sum(parameter.numel() for parameter in model.model.layers[1:3].parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert capsys.readouterr().out == f"--train_blocks 1:3: {trained:,} of {total:,} weights are trained\n"
    train_only(model, None)
    assert not model.model.norm.weight.requires_grad  # None changes nothing


def test_the_trained_blocks_move_as_they_would_beside_the_others(model_folder, data):
    """What is frozen must not change the gradient of the rest: with no clipping, the first step is the same."""
    settings = dict(max_steps=1, max_grad_norm=float("inf"), gradient_checkpointing=False)
    grpo.main(arguments(grpo, model_folder, data, output_dir="all", **settings))
    grpo.main(arguments(grpo, model_folder, data, output_dir="some", train_blocks="1:2", **settings))
    some, everything = load_file("some/model.safetensors"), load_file("all/model.safetensors")
    for name in names_of_blocks(model_folder, 1):
        assert torch.allclose(some[name], everything[name], atol=1e-7), name


@pytest.mark.parametrize("text, expected", [("0:1", (0, 1)), ("1:3", (1, 3)), ("0:4", (0, 4)), ("3:4", (3, 4))])
def test_a_range_of_blocks_is_a_slice(text, expected):
    assert block_range(text, 4) == expected


NO_RANGE = ["", "2", "2:2", "3:1", "0:5", "4:5", "-1:2", ":2", "1:", "a:b", "0:1:2", f"0:{10**20}"]


@pytest.mark.parametrize("text", NO_RANGE)
def test_what_is_no_range_of_blocks_is_refused(text):
    with pytest.raises(UserError) as error:
        block_range(text, 4)
    message = str(error.value)
    assert message.startswith(f"--train_blocks {text}: this model has blocks 0 to 3; ") and "\n" not in message


# ---------------------------------------------------------------------------------------------------------------------
# Bottom-up training
# ---------------------------------------------------------------------------------------------------------------------


def choice(**options):
    return SimpleNamespace(**dict(seed=0, internal_steps=1, train_blocks=None) | options)


def test_phase_one_trains_what_both_allow(model_folder, data):
    """Blocks up to k have a gradient, --train_blocks leaves it to block 0; in phase two it still does."""
    bupo.main(arguments(bupo, model_folder, data, internal_layer=1, internal_steps=1, train_blocks="0:1"))
    assert moved(model_folder) == names_of_blocks(model_folder, 0)


def test_a_phase_one_that_trains_nothing_is_refused():
    """A backward pass through frozen weights alone dies in torch, an hour of loading and sampling later."""
    model = tiny_model()
    for layer, train_blocks in ((0, "1:4"), (2, "3:4")):
        with pytest.raises(UserError) as error:
            block_number(model, layer, choice(train_blocks=train_blocks))
        message = str(error.value)
        assert message.startswith(f"--train_blocks {train_blocks}: phase one trains no block above {layer}; ")
        assert block_number(model, layer, choice(train_blocks=train_blocks, internal_steps=0)) == layer
    assert block_number(model, "2", choice(train_blocks="2:4")) == 2
    assert block_number(model, 3, choice(train_blocks="0:1")) == 3


def test_a_random_block_is_drawn_by_the_seed():
    """Drawn by a clock, a resumed run would train another block."""
    model = tiny_model()
    drawn = [block_number(model, "random", choice(seed=seed)) for seed in range(40)]
    assert drawn == [block_number(model, "random", choice(seed=seed)) for seed in range(40)]
    assert set(drawn) == {0, 1, 2, 3}


def test_a_random_block_is_said(model_folder, data, capsys):
    bupo.main(arguments(bupo, model_folder, data, internal_layer="random", max_steps=1, seed=3))
    k = block_number(tiny_model(num_hidden_layers=3), "random", choice(seed=3))
    assert f"block {k}'s policy is trained until step 1 of 1" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# --lr_below
# ---------------------------------------------------------------------------------------------------------------------


def distances(model, optimizer, rate=None):
    """How far the first step of AdamW moves every weight: its learning rate, whatever the gradient, as in sign descent;
    mean distance by name."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.where(torch.arange(parameter.numel()).view_as(parameter) % 2 == 0, 0.5, -2.0)
    optimizer.step(rate)
    return {name: (p.detach() - before[name]).abs().mean().item() for name, p in model.named_parameters()}


def optimizer_below(model, lr_below):
    args = RunArgs(learning_rate=1e-2, weight_decay=0.0, max_grad_norm=1e9)
    return Optimizer(model, args, rate_factors(model, lr_below))


@pytest.mark.parametrize("rate", [None, 3e-2], ids=["constant", "schedule"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_blocks_below_have_a_rate_of_their_own(tied, rate, model_folder):
    """A schedule (sft.py has one) that sets the rate anew must not forget the factor."""
    model = tiny_model(tied=tied)
    found = distances(model, optimizer_below(model, "2:0.1"), rate)
    slow = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.")
    assert ("lm_head.weight" in found) == (not tied)  # tied, it is the embedding, and as slow
    for name, distance in found.items():
        expected = (rate or 1e-2) * (0.1 if name.startswith(slow) else 1.0)
        assert distance == pytest.approx(expected, rel=2e-3), name


@pytest.mark.parametrize(
    "lr_below, slow, factor",
    [
        ("0:0.5", ["embed_tokens"], 0.5),
        ("1:10", ["embed_tokens", "layers.0."], 10.0),
        ("4:1e-2", ["embed_tokens", "layers.0.", "layers.1.", "layers.2.", "layers.3."], 0.01),
        ("1:0", ["embed_tokens", "layers.0."], 0.0),
    ],
)
def test_the_embedding_belongs_to_the_blocks_below(lr_below, slow, factor):
    model = tiny_model(tied=False)
    prefixes = tuple(f"model.{name}" for name in slow)
    expected = {name: factor for name, _ in model.named_parameters() if name.startswith(prefixes)}
    assert rate_factors(model, lr_below) == expected
    assert rate_factors(model, None) == {}


@pytest.mark.parametrize("text", ["", "2", "5:0.1", "-1:0.1", "1:-1", "1:inf", "1:nan", "1:1e999", "1:", ":1", "1:."])
def test_what_is_no_lower_rate_is_refused(text):
    with pytest.raises(UserError) as error:
        rate_factors(tiny_model(), text)
    message = str(error.value)
    assert message.startswith(f"--lr_below {text}: this model has blocks 0 to 3; ") and "\n" not in message


def test_a_run_has_these_rates(model_folder, data):
    """With --lr_below 1:0 embedding and block 0 stay where they are, decay or not; everything else learns."""
    grpo.main(arguments(grpo, model_folder, data, lr_below="1:0", weight_decay=0.1))
    start = load_file(model_folder / "model.safetensors")
    slow = {"model.embed_tokens.weight"} | names_of_blocks(model_folder, 0)
    assert moved(model_folder) == start.keys() - slow
    rates = {name: s["adam"]["param_groups"][0]["lr"] for name, s in torch.load("run/optimizer.pt").items()}
    assert rates == {name: 0.0 if name in slow else 1e-3 for name in start}


def test_both_options_are_the_policys(model_folder, data):
    """The critic of ppo.py is another network, with a learning rate of its own."""
    settings = dict(train_blocks="1:2", lr_below="2:0.1", max_steps=1, critic_learning_rate=3e-3)
    ppo.main(arguments(ppo, model_folder, data, **settings))
    policy = torch.load("run/optimizer.pt", weights_only=True)
    critic = torch.load("run/critic.pt", weights_only=True)
    assert policy.keys() == names_of_blocks(model_folder, 1)
    assert {slot["adam"]["param_groups"][0]["lr"] for slot in policy.values()} == {1e-3 * 0.1}
    assert critic.keys() > load_file(model_folder / "model.safetensors").keys()
    assert {slot["adam"]["param_groups"][0]["lr"] for slot in critic.values()} == {3e-3}
