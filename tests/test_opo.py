"""OPO: its baseline and loss by hand, against an independent reference and by exact enumeration, and the loop."""

import objectives
import pytest
import torch
from helpers import arguments, read_jsonl
from objectives import (
    GIVEN,
    Table,
    assert_same_gradients,
    gradients_of,
    masked_average,
    relative_error,
    textbook,
    watch,
)

# Tests of the trunk that hold here as they stand: the fixture `script` decides.
from test_grpo import test_a_batch_without_signal_takes_no_step  # noqa: F401

import opo


@pytest.fixture
def script():
    return opo


def one_step(model_folder, data, **overrides):
    """Args for one step on the four prompts of GIVEN."""
    return arguments(opo, model_folder, data, **dict(num_prompts=4, max_steps=1) | overrides)


def test_the_defaults_are_the_papers():
    """A default changed in passing makes every run of this repository another experiment than the paper's."""
    args = opo.Args()
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (1e-6, 0.01, 1.0)
    assert (args.num_prompts, args.num_generations, args.temperature, args.max_steps) == (128, 8, 1.0, 300)
    for name in ("num_minibatches", "epsilon", "beta", "advantage"):
        assert not hasattr(args, name)  # exactly on-policy, without reference


# ---------------------------------------------------------------------------------------------------------------------
# Advantages
# ---------------------------------------------------------------------------------------------------------------------


def random_groups(P, G, seed=0):
    """Rewards and lengths [P, G]."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(P, G, generator=generator)
    return rewards, torch.randint(1, 9, (P, G), generator=generator)


def test_advantages_by_hand():
    """An unweighted baseline, one over the batch, one weighed by 1/l, or a division by the standard deviation."""
    rewards = torch.tensor(
        [
            [1.0, 0.0, 0.0, 1.0],
            [1.0, 0.0, 0.0, 0.0],
            [1.0, 1.0, 1.0, 1.0],
        ]
    )
    lengths = torch.tensor(
        [
            [1, 2, 3, 4],  # b = (1 + 4) / 10
            [5, 1, 1, 1],  # b = 5 / 8
            [2, 2, 1, 1],  # b = 1
        ]
    )
    expected = torch.tensor(
        [
            [0.5, -0.5, -0.5, 0.5],
            [0.375, -0.625, -0.625, -0.625],
            [0.0, 0.0, 0.0, 0.0],
        ]
    )
    assert torch.equal(opo.advantages(rewards, lengths), expected)


def test_advantages_against_a_float64_reference():
    for P, G in ((1, 2), (3, 5), (4, 16)):
        rewards, lengths = random_groups(P, G)
        A = opo.advantages(rewards, lengths)
        assert A.shape == (P, G)
        for p in range(P):
            row = rewards[p].tolist()
            weights = lengths[p].tolist()
            baseline = sum(weight * reward for weight, reward in zip(weights, row)) / sum(weights)
            expected = [reward - baseline for reward in row]
            assert A[p].tolist() == pytest.approx(expected, abs=1e-6)


def test_equal_lengths_leave_the_plain_mean():
    """With all weights alike the baseline is Dr.GRPO's; so the weights are lengths, and sum to one."""
    rewards, lengths = random_groups(3, 6)
    expected = rewards - rewards.mean(1, keepdim=True)
    assert torch.allclose(opo.advantages(rewards, torch.full_like(lengths, 7)), expected, atol=1e-6)
    assert not torch.allclose(opo.advantages(rewards, lengths), expected, atol=1e-2)


def test_advantages_weighed_by_length_sum_to_nothing():
    """The length-weighted mean advantage of a group is zero: no push in total on the tokens of a prompt."""
    rewards, lengths = random_groups(8, 16)
    A = opo.advantages(rewards, lengths)
    assert ((lengths * A).sum(1).abs() < 1e-4).all()
    assert (A.sum(1).abs() > 1e-3).any()  # the plain sum is another thing


@pytest.mark.parametrize("reward, G", [(1.0, 8), (0.0, 8), (0.95, 7), (0.01, 12), (0.1, 3)])
def test_equal_rewards_give_exactly_no_advantage(reward, G):
    """The weighted mean of seven 0.95 is not 0.95: noise that reaches the optimizer is a push at random."""
    A = opo.advantages(torch.full((3, G), reward), torch.randint(1, 9, (3, G)))
    assert not A.any()


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "A, logp, expected",
    [
        (1.0, -2.0, 2.0),
        (-0.5, -2.0, -1.0),
        (0.0, -3.0, 0.0),
    ],
)
def test_loss_of_one_token_by_hand(A, logp, expected):
    """REINFORCE's sign: minimizing -A log pi raises the log-prob of what did better than the baseline."""
    logps = torch.tensor([[logp, -5.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0]])
    value = opo.loss(logps, torch.tensor([[A]]), mask)
    value.backward()
    assert value.item() == pytest.approx(expected)
    assert logps.grad.tolist() == [[-A, 0.0]]


@pytest.mark.parametrize("columns", [1, 9], ids=["advantage_per_row", "advantage_per_token"])
def test_loss_against_a_float64_reference(columns):
    """A mean where a sum is meant (it depends on the micro-batch), or padding in the loss."""
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(6, 9, generator=generator) - 3
    A = torch.randn(6, columns, generator=generator)
    mask = (torch.rand(6, 9, generator=generator) < 0.7).float()
    value = opo.loss(logps, A, mask)
    tokens = mask.bool()
    columns = (A.expand(6, 9)[tokens].tolist(), logps[tokens].tolist())
    expected = sum(-a * logp for a, logp in zip(*columns))
    assert value.dim() == 0 and value.item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Exact enumeration: the whole distribution as one group
# ---------------------------------------------------------------------------------------------------------------------

# Where all four tokens are equally likely, an answer of l tokens has probability 4 ** -l: 16, 4 or 1 of 64. So a group
# of 64 samples can hold every answer just as often as it is sampled, and its averages are the exact expectations.
WHOLE_GROUP = []
for row, length in enumerate(objectives.LENGTHS.tolist()):
    WHOLE_GROUP.extend([row] * 4 ** (3 - length))


def enumerated():
    """(uniform policy, rewards [40] of the answers, advantages [1, 64] of the whole group)."""
    model = Table(scale=0.0)
    lengths = objectives.LENGTHS
    # Rewards that grow with the length, for most answers: otherwise the two baselines would be nearly the same.
    generator = torch.Generator().manual_seed(2)
    rewards = torch.rand(40, generator=generator) + 0.5 * lengths
    A = opo.advantages(rewards[WHOLE_GROUP][None], lengths[WHOLE_GROUP][None])
    return model, rewards, A


def score_gradients(model):
    """grad log pi of each of the 40 answers, [40, 52]: minus the gradient of opo.loss with an advantage of 1."""
    gradients = []
    for row in range(len(objectives.ANSWERS)):
        logps, _ = model.score([row])
        value = opo.loss(logps, torch.ones(1, 1), objectives.MASK[[row]])
        value.backward()
        gradients.append(-model.gradient().flatten())
    return torch.stack(gradients)


def test_estimate_over_the_whole_distribution_is_the_gradient_of_the_expected_reward():
    """No sampling error to hide behind: a wrong sign, shift or mask is a wrong number here; the baseline cancels."""
    model, rewards, A = enumerated()
    assert len(WHOLE_GROUP) == 64
    logps, _ = model.score(WHOLE_GROUP)
    value = opo.loss(logps, A.view(-1, 1), objectives.MASK[WHOLE_GROUP])
    (value / 64).backward()
    exact = objectives.gradient_of_expected_reward(model, rewards)
    assert relative_error(-model.gradient(), exact) < 1e-5


def test_the_baseline_has_the_least_variance():
    """What OPO is named for. Each of these tokens' gradients has the same norm, and those of different tokens stand at
    right angles: the paper's assumption holds exactly, |grad log pi|^2 is proportional to the length, and no other
    baseline, the plain mean least of all, gives an estimate of less variance."""
    model, rewards, A = enumerated()
    scores = score_gradients(model)
    squared = (scores**2).sum(1)
    assert torch.allclose(squared, 0.75 * objectives.LENGTHS.double(), atol=1e-5)

    def variance(advantages):
        """Of the estimate A grad log pi, summed over its entries; advantages [64]."""
        estimates = advantages.double()[:, None] * scores[WHOLE_GROUP]
        return float((estimates - estimates.mean(0)).square().sum(1).mean())

    group = rewards[WHOLE_GROUP]
    baseline = float((group - A[0]).mean())
    assert torch.allclose(group - A[0], torch.tensor(baseline))  # one for the whole group
    least = variance(A[0])
    for step in (-0.3, -0.1, -0.03, 0.03, 0.1, 0.3):
        assert variance(group - (baseline + step)) > least * (1 + 1e-4)
    assert variance(group - group.mean()) > 1.02 * least
    norm_weighted = (squared[WHOLE_GROUP] * group).sum() / squared[WHOLE_GROUP].sum()  # E[|g|^2 R] / E[|g|^2]
    assert baseline == pytest.approx(float(norm_weighted), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The loop: what reaches the optimizer
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_one_step_is_the_objective(temperature, model_folder, data):
    """The whole loop against a textbook: logits in full, every row included, the mean over all completion tokens.

    Lengths that count the prompt, a division by the std, padding in the denominator, and advantages read prompt by
    prompt for sample by sample all give another gradient.
    """
    seen = watch(opo, one_step(model_folder, data, temperature=temperature))
    rollouts = seen.rollouts[0]
    lengths = rollouts.mask.sum(1).view(4, 4)
    for p in (0, 2, 3):
        assert len(set(lengths[p].tolist())) > 1  # or any weights would do
    baseline = (lengths * GIVEN).sum(1, keepdim=True) / lengths.sum(1, keepdim=True)
    A = (GIVEN - baseline).view(-1, 1)
    model, logps, _, mask = textbook(model_folder, rollouts, temperature)
    masked_average(-A * logps, mask).backward()
    assert_same_gradients(seen.gradients[0], gradients_of(model), 1e-5)


def test_micro_batches_do_not_change_the_gradient(model_folder, data):
    """A mean of means: results that change with the memory at hand. The normaliser is the whole batch's tokens."""

    def run(budget):
        settings = dict(learning_rate=0.0, micro_batch_tokens=budget, output_dir=f"{budget}")
        return watch(opo, one_step(model_folder, data, **settings))

    objectives.assert_gradient_is_free_of_micro_batches(run)


def test_one_batch_is_one_update(model_folder, data):
    """A second update on the same samples would be off-policy, which nothing here corrects."""
    seen = watch(opo, one_step(model_folder, data, max_steps=2, micro_batch_tokens=1))
    assert len(seen.gradients) == len(seen.rollouts) == 2
    assert [record["optimizer_steps"] for record in read_jsonl("run/metrics.jsonl")] == [1, 1]


def test_one_step_raises_what_was_rewarded(model_folder, data):
    """The sign, all the way from rewards to weights: right answers become likelier, wrong ones less likely."""
    seen = watch(opo, one_step(model_folder, data, learning_rate=1e-3))
    change, _ = objectives.log_prob_changes(model_folder, "run", seen.rollouts[0])
    change = change.sum(1).view(4, 4)
    A = opo.advantages(GIVEN, seen.rollouts[0].lengths.view(4, 4))
    assert change[A > 0].mean() > 0
    assert change[A < 0].mean() < 0


def test_only_log_probs_hold_a_graph_during_backward(model_folder, data, monkeypatch):
    objectives.assert_only_the_trained_graph_is_held(opo, one_step(model_folder, data), 0, monkeypatch)
