"""BuPO: what holds for the trunk holds for bupo.py, too; then phase one, whose policy it is, and the switch."""

import objectives
import pytest
import torch
from helpers import arguments, read_jsonl
from objectives import GIVEN, assert_same_gradients, gradients_of, masked_average, textbook, watch

# Tests of the trunk's equations and loop, which run here on bupo.py: the fixture `script` decides.
from test_grpo import (  # noqa: F401
    test_a_batch_without_signal_takes_no_step,
    test_advantages_against_a_float64_reference,
    test_advantages_by_hand,
    test_checkpointing_does_not_change_the_gradient,
    test_enumeration_notices_bugs,
    test_equal_rewards_give_exactly_no_advantage,
    test_every_minibatch_is_the_objective_of_its_prompts,
    test_expected_estimate_is_the_gradient_of_the_expected_reward,
    test_huge_log_prob_gaps_keep_gradients_finite,
    test_loss_against_a_float64_reference,
    test_loss_counts_the_clipped_tokens,
    test_loss_of_one_token_by_hand,
    test_micro_batches_do_not_change_the_gradient,
    test_old_log_probs_come_before_the_first_update,
    test_on_policy_gradient_is_reinforce,
    test_one_step_is_the_objective,
    test_one_step_raises_what_was_rewarded,
    test_only_log_probs_hold_a_graph_during_backward,
    test_ratios_start_at_exactly_one_in_bf16,
    test_reference_holds_the_policy_back,
    test_reference_is_read_at_the_policys_temperature,
    test_reference_term_is_the_kl,
    test_rows_without_advantage_are_held_to_the_reference,
    test_the_defaults_are_the_papers,
)

import bupo
import grpo
from plumbing.models import load_model
from plumbing.optimizer import Optimizer


@pytest.fixture
def script():
    return bupo


def internal(model_folder, data, **overrides):
    """Args for one step of phase one on block 1 of three, with the four prompts of GIVEN."""
    settings = dict(num_prompts=4, max_steps=1, internal_layer=1, internal_steps=1)
    return arguments(bupo, model_folder, data, **settings | overrides)


def weights(folder):
    return load_model(str(folder), "cpu")[0].state_dict()


def optimizers_of(monkeypatch):
    """A list that every optimizer made from here on is added to."""
    optimizers = []
    real_init = Optimizer.__init__

    def init(optimizer, *rest):
        optimizers.append(optimizer)
        real_init(optimizer, *rest)

    monkeypatch.setattr(Optimizer, "__init__", init)
    return optimizers


def test_the_defaults_of_phase_one_are_the_papers():
    args = bupo.Args()
    assert (args.internal_layer, args.internal_steps, args.internal_norm) == (5, 30, False)
    assert (args.internal_objective, args.internal_reset) == ("internal", False)
    trunk = {name: value for name, value in vars(grpo.Args()).items() if name != "output_dir"}
    assert trunk.items() <= vars(args).items()


# ---------------------------------------------------------------------------------------------------------------------
# Phase one
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normed"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_internal_step_is_the_objective_of_the_block(norm, temperature, model_folder, data):
    """Phase one against the textbook: raw state after block k times the head; samples of the whole policy."""
    settings = dict(max_steps=2, internal_norm=norm, temperature=temperature)
    seen = watch(bupo, internal(model_folder, data, **settings))
    rollouts = seen.rollouts[0]
    A = bupo.advantages(GIVEN, rollouts.lengths.view(4, 4)).view(-1, 1)
    model, logps, _, mask = textbook(model_folder, rollouts, temperature, layer=1, norm=norm)
    masked_average(-A * logps, mask).backward()
    expected = gradients_of(model)
    assert not any(name.startswith("model.layers.2.") for name in expected)
    assert ("model.norm.weight" in expected) == norm
    assert_same_gradients(seen.gradients[0], expected, 1e-5)
    assert seen.gradients[1].keys() == dict(model.named_parameters()).keys()  # phase two trains everything


@pytest.mark.parametrize("minibatches", [1, 2])
def test_micro_batches_do_not_change_the_internal_gradient(minibatches, model_folder, data):
    def run(budget):
        settings = dict(num_minibatches=minibatches, learning_rate=0.0, micro_batch_tokens=budget)
        return watch(bupo, internal(model_folder, data, output_dir=f"{budget}", **settings))

    # raw internal logits are larger, and so is their rounding
    objectives.assert_gradient_is_free_of_micro_batches(run, tolerance=5e-6)


def test_samples_of_phase_one_come_from_the_whole_policy(model_folder, data):
    """A step of phase one begins with the very answers that the trunk would sample."""
    seen = watch(bupo, internal(model_folder, data))
    trunk = watch(grpo, arguments(grpo, model_folder, data, num_prompts=4, max_steps=1, output_dir="trunk"))
    assert torch.equal(seen.rollouts[0].ids, trunk.rollouts[0].ids)
    assert torch.equal(seen.rollouts[0].logps, trunk.rollouts[0].logps)


def test_old_log_probs_of_phase_one_are_the_internal_policys(model_folder, data, monkeypatch):
    """Old log-probs of the whole policy under new ones of block k: the ratio starts nats away from 1."""
    ratios = objectives.log_ratios(bupo, monkeypatch)
    settings = dict(num_minibatches=4, learning_rate=1e-2, micro_batch_tokens=10**6)
    watch(bupo, internal(model_folder, data, **settings))
    assert len(ratios) == 3  # one of the four mini-batches teaches nothing
    assert ratios[0] < 1e-4 and min(ratios[1:]) > 1e-2


@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normed"])
def test_reference_of_phase_one_is_the_internal_policy(norm, model_folder, data):
    """Held to the whole policy of the starting model, block k's would be pulled where it never was."""
    settings = dict(beta=0.5, num_minibatches=2, learning_rate=0.0, internal_norm=norm)
    watch(bupo, internal(model_folder, data, **settings))
    assert abs(read_jsonl("run/metrics.jsonl")[0]["reference_kl"]) < 1e-6


def test_there_is_no_log_prob_gap_in_phase_one(model_folder, data):
    """The trained policy is another one than the sampled: their distance is no fault, and no warning is due."""
    watch(bupo, internal(model_folder, data, max_steps=2))
    first, second = read_jsonl("run/metrics.jsonl")
    assert first["logp_gap"] is None and first["logp_gap_max"] is None
    assert second["logp_gap"] < 1e-5
    assert (first["phase"], second["phase"]) == ("internal", "whole")


def test_phase_one_leaves_what_lies_above_the_block(model_folder, data):
    """Blocks above k and the final norm stay bit for bit, decay or not; everything up to k moves."""
    watch(bupo, internal(model_folder, data, weight_decay=0.1, internal_steps=2, max_steps=2))
    start, trained = weights(model_folder), weights("run")
    for name, tensor in start.items():
        above = name.startswith(("model.layers.2.", "model.norm."))
        assert torch.equal(tensor, trained[name]) == above, name


@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normed"])
def test_the_control_moves_the_same_weights_for_the_whole_policy(norm, model_folder, data, capsys):
    """--internal_objective whole: the gradient is the whole policy's, of the weights that block k's policy depends on.
    With one block more it would be no control; and phase two must train everything."""
    settings = dict(internal_objective="whole", internal_norm=norm, max_steps=2)
    seen = watch(bupo, internal(model_folder, data, **settings))
    assert "only what block 1's policy depends on moves until step 1 of 2" in capsys.readouterr().out
    rollouts = seen.rollouts[0]
    A = bupo.advantages(GIVEN, rollouts.lengths.view(4, 4)).view(-1, 1)
    model, logps, _, mask = textbook(model_folder, rollouts, 1.0)
    masked_average(-A * logps, mask).backward()
    expected = gradients_of(model)
    for name in list(expected):
        if name.startswith("model.layers.2.") or (name.startswith("model.norm.") and not norm):
            del expected[name]
    assert_same_gradients(seen.gradients[0], expected, 1e-5)
    assert seen.gradients[1].keys() == dict(model.named_parameters()).keys()
    first, second = read_jsonl("run/metrics.jsonl")
    assert first["phase"] == second["phase"] == "whole"
    assert first["logp_gap"] < 1e-5  # what is trained is what was sampled, so the gap must be there


# ---------------------------------------------------------------------------------------------------------------------
# The switch
# ---------------------------------------------------------------------------------------------------------------------


def test_the_optimizer_is_carried_over_at_the_switch(model_folder, data, monkeypatch):
    """A new optimizer in phase two forgets the moments of phase one: another algorithm than the paper's.

    So two steps, one of each phase, leave the state that one optimizer has after just these two gradients.
    """
    optimizers = optimizers_of(monkeypatch)
    args = internal(model_folder, data, max_steps=2)
    seen = watch(bupo, args)
    trained = weights("run")
    used = optimizers[-1].state_dict()

    model, _ = load_model(str(model_folder), "cpu")
    optimizer = Optimizer(model, args)
    for gradients in seen.gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.get(name)
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(trained[name], tensor), name
    for name, state in optimizer.state_dict().items():
        steps = used[name]["adam"]["state"][0]["step"]
        assert steps == state["adam"]["state"][0]["step"] == (2 if name in seen.gradients[0] else 1), name


@pytest.mark.parametrize("reset, steps", [(False, 4), (True, 2)], ids=["carried over", "begun anew"])
@pytest.mark.parametrize("first", [2, 3, 4], ids=["resumed at the switch", "resumed behind it", "in one go"])
def test_moments_begin_anew_where_asked_for(first, reset, steps, model_folder, data, monkeypatch):
    """At the switch and nowhere else: moments that begin anew in every step, or once more in a run that is resumed,
    would be a third algorithm."""
    optimizers = optimizers_of(monkeypatch)
    for max_steps in sorted({first, 4}):
        watch(bupo, internal(model_folder, data, internal_steps=2, max_steps=max_steps, internal_reset=reset))
    used = optimizers[-1].state_dict()
    assert used["model.embed_tokens.weight"]["adam"]["state"][0]["step"] == steps


def test_no_internal_steps_is_the_trunk_bit_for_bit(model_folder, data):
    """Anything bupo.py does differently in phase two is a second difference, beside the one its paper is about."""
    settings = dict(num_prompts=4, num_minibatches=2, max_steps=2)
    watch(grpo, arguments(grpo, model_folder, data, output_dir="trunk", **settings))
    watch(bupo, arguments(bupo, model_folder, data, output_dir="bottom_up", internal_steps=0, **settings))
    ours, trunk, start = weights("bottom_up"), weights("trunk"), weights(model_folder)
    assert all(torch.equal(ours[name], trunk[name]) for name in trunk)
    assert not all(torch.equal(ours[name], start[name]) for name in trunk)


def test_more_internal_steps_than_steps_is_said_and_allowed(model_folder, data, capsys):
    """Phase one for ever is the paper's own ablation; who meant something else is told in one line."""
    bupo.main(arguments(bupo, model_folder, data, internal_steps=50))
    assert "block 1's policy is trained until step 50 of 2, then the whole one" in capsys.readouterr().out.splitlines()
    assert [record["phase"] for record in read_jsonl("run/metrics.jsonl")] == ["internal"] * 2
