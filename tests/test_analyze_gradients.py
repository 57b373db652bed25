"""The variance of the policy gradient, on a policy small enough to enumerate and against whole gradients."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from bigram import drawn, evaluation, sample_files
from helpers import grade

import analyze_gradients
import common
import tasks
from plumbing import samples
from plumbing.errors import UserError
from plumbing.models import load_model


def enumeration_toy(scale=1.0):
    """A policy over {a, end}, probability 1/2 each at each of three positions. The parameters are its logits; those of
    the first position are multiplied by `scale`, and so is their gradient.

    Repeating each completion in proportion to its probability makes a mean over the group the exact expectation: end 4
    times in 8, a end 2 times, aa end and aaa once. -> (gradients [8, 6], rewards [8], lengths [8]), fp64.
    """
    # d log pi / d logits: 1 - p for the token drawn, -p for the other
    step = {"a": torch.tensor([0.5, -0.5]).double(), "e": torch.tensor([-0.5, 0.5]).double()}
    gradients = []
    lengths = []
    for word, copies in {"e": 4, "ae": 2, "aae": 1, "aaa": 1}.items():
        g = torch.zeros(3, 2).double()
        for position, token in enumerate(word):
            g[position] = step[token]
        g[0] *= scale
        gradients += [g.flatten()] * copies
        lengths += [len(word)] * copies
    rewards = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1], dtype=torch.float64)
    return torch.stack(gradients), rewards, torch.tensor(lengths)


def covariance_trace(gradients, rewards, b):
    x = gradients * (rewards - b)[:, None]
    return float((x - x.mean(0)).square().sum(1).mean())


def five_variances(gradients, rewards, lengths, weights=None):
    """weights: those of the logit-weighted baseline, one per answer; all 1 if none are given."""
    if weights is None:
        weights = torch.ones_like(rewards)
    mean_square = (gradients * rewards[:, None]).mean(0).square().sum()[None]
    squares = gradients.square().sum(1)
    return analyze_gradients.gradient_variance(
        squares[None], weights[None], rewards[None], lengths[None], mean_square
    )


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_gradient_variance_by_enumeration(scale):
    """Each number is the trace of the exact covariance; below the norm-weighted one is no other, of any baseline."""
    gradients, rewards, lengths = enumeration_toy(scale)
    assert gradients.mean(0).abs().max() == 0  # E grad log pi = 0: the estimate is unbiased whatever the baseline
    squares = gradients.square().sum(1)
    weights = torch.arange(8.0, dtype=torch.float64)
    baselines = {
        "no baseline": 0.0,
        "mean": rewards.mean(),
        "length-weighted": (lengths * rewards).sum() / lengths.sum(),
        "logit-weighted": (weights * rewards).sum() / weights.sum(),
        "norm-weighted": (squares * rewards).sum() / squares.sum(),
    }
    found = five_variances(gradients, rewards, lengths, weights)
    assert list(found) == list(baselines)
    for name, b in baselines.items():
        assert found[name] == pytest.approx(covariance_trace(gradients, rewards, b), rel=1e-12)
    grid = min(covariance_trace(gradients, rewards, b) for b in torch.linspace(-1, 2, 3001, dtype=torch.float64))
    assert min(found.values()) == found["norm-weighted"] <= grid + 1e-12


def test_the_length_weighted_baseline_is_the_norm_weighted_one_where_its_assumption_holds():
    """Per-token gradients uncorrelated and of equal norm, as in the toy: OPO's baseline is optimal and beats the mean.
    With a first token whose gradient is three times as long it is not optimal any more."""
    alike = five_variances(*enumeration_toy())
    assert alike["length-weighted"] == pytest.approx(alike["norm-weighted"], rel=1e-12)
    assert alike["length-weighted"] < alike["mean"]
    unlike = five_variances(*enumeration_toy(3.0))
    assert unlike["norm-weighted"] < 0.99 * unlike["length-weighted"]


def test_equal_lengths_leave_the_mean_and_prompts_are_averaged():
    generator = torch.Generator().manual_seed(0)
    squares, weights, rewards = torch.rand(3, 3, 8, generator=generator, dtype=torch.float64)
    rewards = rewards.round()
    lengths = torch.full((3, 8), 7)
    mean_square = torch.tensor([0.1, 0.0, -0.1])
    together = analyze_gradients.gradient_variance(squares, weights, rewards, lengths, mean_square)
    assert together["length-weighted"] == pytest.approx(together["mean"], rel=1e-12)
    apart = []
    for p in range(3):
        parts = [values[p : p + 1] for values in (squares, weights, rewards, lengths, mean_square)]
        apart.append(analyze_gradients.gradient_variance(*parts))
    for name, value in together.items():
        assert value == pytest.approx(sum(one[name] for one in apart) / 3)


def test_squares_at_the_logits_are_those_of_gradients(world, monkeypatch):
    """Where every logit is a parameter, |grad log pi(y)|^2 is a sum over tokens: by autograd, against the formula. The
    distribution is the one at the temperature, and answers longer than a piece are summed up over pieces."""
    monkeypatch.setattr(analyze_gradients, "POSITIONS", 2)
    model, rollouts = drawn(world)
    found = analyze_gradients.squares_at_logits(model, rollouts, temperature=0.7)
    for row in range(len(rollouts.ids)):
        ids = rollouts.ids[row]
        attention_mask = rollouts.attention_mask[row]
        logits = model(input_ids=ids[None], attention_mask=attention_mask[None]).logits[0, :-1] / 0.7
        logits = logits.detach().requires_grad_()
        logps = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        (logps * rollouts.mask[row, 1:]).sum().backward()
        assert float(found[row]) == pytest.approx(float(logits.grad.square().sum()), rel=1e-5)


def test_gradient_moments_against_whole_gradients(world):
    """One gradient at a time gives the norms, and the mean over pairs, that all gradients side by side give."""
    model, rollouts = drawn(world)
    before = [parameter.clone() for parameter in model.parameters()]
    rewards = (torch.arange(24).view(4, 6) % 3 == 0).double()
    squares, mean_square = analyze_gradients.gradient_moments(model, rollouts, rewards, temperature=0.7)
    for p in range(4):
        x = []
        for i in range(6):
            row = p * 6 + i
            ids = rollouts.ids[row]
            attention_mask = rollouts.attention_mask[row]
            logits = model(input_ids=ids[None], attention_mask=attention_mask[None]).logits
            logps = (logits[0, :-1] / 0.7).log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            total = (logps * rollouts.mask[row, 1:]).sum()
            g = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
            g = torch.cat([part.flatten() for part in g if part is not None]).double()
            assert squares[p, i].item() == pytest.approx(g.square().sum().item(), rel=1e-4)
            x.append((rewards[p, i] - rewards[p].mean()) * g)
        pairs = [float(x[i] @ x[j]) for i, j in itertools.permutations(range(6), 2)]
        expected = sum(pairs) / len(pairs)
        assert mean_square[p].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for old, parameter in zip(before, model.parameters()):
        assert torch.equal(old, parameter)
        assert parameter.grad is None


def test_the_gradient_is_that_of_the_policy_sampled_from(world):
    """Log-probs at the sampling temperature, rewards and lengths of the kept answers, prompt by prompt."""
    evaluation(world, "--temperatures", "0.5", models=["base"])
    analyze_gradients.main(analyze_gradients.parse(["out", "--probe_problems", "3"]))
    found = json.loads(Path("out/gradient_variance.json").read_text())["models"]["base"]
    model, _ = load_model(str(world / "base"))
    records = list(itertools.islice(samples.read_records(sample_files()[0]), 3))
    prompts, completions = samples.prompts_and_completions(records)
    rollouts = common.assemble(prompts, completions, 0, model.device)
    rewards = []
    for record in records:
        problem = tasks.problem_from_record(record)
        rewards.append(grade(record["texts"], [problem] * 8, record["finished"]))
    rewards = torch.tensor(rewards).double()
    squares, mean_square = analyze_gradients.gradient_moments(model, rollouts, rewards, 0.5)
    weights = analyze_gradients.squares_at_logits(model, rollouts, 0.5).view(3, 8)
    lengths = rollouts.lengths.view(3, 8)
    expected = analyze_gradients.gradient_variance(squares, weights, rewards, lengths, mean_square)
    assert found == pytest.approx(expected)
    assert Path("out/gradient_variance.png").stat().st_size > 10_000


@pytest.mark.parametrize("options", [["--temperatures", "0"], ["--temperatures", "1"]])
def test_a_variance_needs_two_samples_and_a_temperature(world, options):
    """One answer has no baseline, and greedy answers no gradient."""
    evaluation(world, *options, "--num_problems", "2", models=["base"], n=8 if "0" in options else 1)
    with pytest.raises(UserError, match="2 or more --num_samples of evaluate.py and a temperature above 0"):
        analyze_gradients.main(analyze_gradients.parse(["out"]))


def test_bars_are_relative_to_no_baseline():
    """Models differ a thousandfold in the size of their gradients: beside each other only the ratios can be seen."""
    small = dict(zip(analyze_gradients.BASELINES, [4.0, 2.0, 1.0, 0.5, 3.0]))
    large = dict(zip(analyze_gradients.BASELINES, [400.0, 100.0, 80.0, 40.0, 200.0]))
    variances = {"small": small, "large": large}
    axis = analyze_gradients.draw_gradients(variances).axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in axis.containers]
    assert heights == [[1.0, 1.0], [0.5, 0.25], [0.25, 0.2], [0.125, 0.1], [0.75, 0.5]]  # a pair per baseline
