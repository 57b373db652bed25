"""PPO: the critic's equations by hand and in double precision, whose value stands where, and the loop."""

import math
import statistics
from pathlib import Path

import objectives
import pytest
import torch
from helpers import arguments, assert_same_run, interrupt, read_jsonl
from objectives import GIVEN, assert_same_gradients, gradients_of, masked_average, textbook, watch

# Tests of the trunk that hold here as they stand: the fixture `script` decides.
from test_grpo import (  # noqa: F401
    test_checkpointing_does_not_change_the_gradient,
    test_ratios_start_at_exactly_one_in_bf16,
    test_reference_holds_the_policy_back,
    test_reference_is_read_at_the_policys_temperature,
)

import common
import grpo
import ppo
from plumbing import models
from plumbing.models import load_model
from plumbing.optimizer import Optimizer


@pytest.fixture
def script():
    return ppo


@pytest.fixture
def knowing_critic(monkeypatch):
    """Critics start with a head that is not 0: values that differ from token to token."""
    real = models.give_value_head

    def give_value_head(model):
        real(model)
        head = model.get_output_embeddings().weight
        head.data = 0.3 * torch.randn(head.shape, generator=torch.Generator().manual_seed(3))

    monkeypatch.setattr(models, "give_value_head", give_value_head)


def settings_for(model_folder, data, **overrides):
    """Args for one step on the four prompts of GIVEN."""
    return arguments(ppo, model_folder, data, **dict(num_prompts=4, max_steps=1) | overrides)


def critics(seen):
    """The gradients of the critic: its optimizer takes the first step of each mini-batch."""
    return seen.gradients[0::2]


def policies(seen):
    return seen.gradients[1::2]


def test_the_defaults_are_the_papers():
    """A published recipe (arXiv 2503.01307): 256 x 4 samples, two mini-batches' worth of the trunk's settings."""
    args = ppo.Args()
    assert args.num_prompts * args.num_generations == grpo.Args().num_prompts * grpo.Args().num_generations == 1024
    assert (args.gamma, args.lam, args.epochs, args.critic_warmup) == (1.0, 1.0, 1, 0)
    assert (args.learning_rate, args.critic_learning_rate, args.cliprange_value) == (1e-6, 1e-5, 0.5)
    assert (args.epsilon, args.epsilon_high, args.delta, args.beta) == (0.2, None, 10.0, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Advantages
# ---------------------------------------------------------------------------------------------------------------------

# Prompts of 1 to 3 tokens, answers of 1 to 4, padding behind.
MASK = torch.tensor(
    [
        [0, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1],
        [0, 1, 0, 0, 0, 0],
    ],
    dtype=torch.float64,
)
REWARDS = torch.tensor([1.0, 0.0, 0.1, 1.0], dtype=torch.float64)


def random_values(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(MASK.shape, generator=generator, dtype=torch.float64) * MASK


def naive_gae(reward, values, gamma, lam):
    """One answer's advantages as the sum of eq. 16, term by term; values: of its tokens, in order."""
    n = len(values)
    advantages = []
    for t in range(n):
        total = 0.0
        for k in range(t, n):
            is_last = k == n - 1
            next_value = 0.0 if is_last else values[k + 1]
            delta = (reward if is_last else 0.0) + gamma * next_value - values[k]
            total += (gamma * lam) ** (k - t) * delta
        advantages.append(total)
    return advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.0), (0.9, 0.95), (0.5, 1.0), (1.0, 0.7)])
def test_advantages_are_the_double_sum(gamma, lam):
    """A reward on every token, a decay that runs over the prompt, the next row's value behind the end, or gamma and
    lambda mixed up."""
    values = random_values()
    A = ppo.advantages(REWARDS, values, MASK, gamma, lam)
    for row in range(len(MASK)):
        tokens = MASK[row].bool()
        expected = naive_gae(REWARDS[row].item(), values[row][tokens].tolist(), gamma, lam)
        assert A[row][tokens].tolist() == pytest.approx(expected, abs=1e-12)
        assert not A[row][~tokens].any()


def test_advantages_by_hand():
    """Two tokens, reward 1 behind the second: with V = (0.25, 0.5), gamma 0.5 and lambda 0.5."""
    values = torch.tensor([[0.0, 0.25, 0.5]])
    A = ppo.advantages(torch.tensor([1.0]), values, torch.tensor([[0.0, 1.0, 1.0]]), 0.5, 0.5)
    assert A.tolist() == [[0.0, 0.5 * 0.5 - 0.25 + 0.25 * 0.5, 0.5]]


def test_what_the_critic_says_outside_an_answer_counts_nothing():
    """The value of padding behind the end token is no future of this answer."""
    values = random_values()
    noise = 100 * (1 - MASK)
    clean, noisy = (ppo.advantages(REWARDS, v, MASK, 0.9, 0.8) for v in (values, values + noise))
    assert torch.equal(clean, noisy)


def test_without_discount_and_decay_it_is_the_reward_minus_the_value():
    values = random_values()
    A = ppo.advantages(REWARDS, values, MASK)
    assert torch.allclose(A, (REWARDS[:, None] - values) * MASK)


def test_whitened_tokens_have_mean_0_and_variance_1():
    """Statistics over padding, over rows instead of tokens, or with n instead of n - 1."""
    A = 5 * random_values() + 3
    tokens = MASK.bool()
    row = A[tokens].tolist()
    found = ppo.whiten(A, MASK)
    expected = [(a - statistics.mean(row)) / statistics.stdev(row) for a in row]
    assert found[tokens].tolist() == pytest.approx(expected, rel=1e-6)
    assert not found[~tokens].any()


def test_equal_advantages_are_whitened_to_nothing():
    assert not ppo.whiten(MASK, MASK).any()
    assert not ppo.whiten(MASK[:1, :2], MASK[:1, :2]).any()  # a single token has no variance


def test_a_critic_that_knows_nothing_leaves_the_trunks_whitened_estimator():
    """Values of 0 are REINFORCE++: another formula, in another file, for the same numbers."""
    A = ppo.whiten(ppo.advantages(REWARDS, torch.zeros_like(MASK), MASK), MASK)
    expected = grpo.advantages(REWARDS[:, None], MASK.sum(1)[:, None], "batch_whitened")
    assert torch.allclose(A, expected * MASK)


# ---------------------------------------------------------------------------------------------------------------------
# The critic's loss, and what it explains
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, old, target, expected, slope",
    [
        (0.5, 0.5, 1.0, 0.125, -0.5),
        (0.9, 0.5, 1.0, 0.5 * 0.3**2, 0.0),  # went up by 0.4, of which 0.2 count: the worse of the two is constant
        (0.6, 0.5, 1.0, 0.5 * 0.4**2, -0.4),  # inside the range
        (0.1, 0.5, 1.0, 0.5 * 0.9**2, -0.9),  # moving the wrong way is never clipped
        (1.5, 0.5, 1.0, 0.125, 0.5),  # beyond the target: worse than 0.7
        (0.1, 0.5, 0.0, 0.5 * 0.3**2, 0.0),
    ],
)
def test_value_loss_of_one_token_by_hand(value, old, target, expected, slope):
    """A minimum for a maximum, a clip around the target instead of the old value, or a factor of two."""
    values = torch.tensor([[value, 7.0]], dtype=torch.float64, requires_grad=True)
    old_values = torch.tensor([[old, 0.0]], dtype=torch.float64)
    returns = torch.tensor([[target, 0.0]], dtype=torch.float64)
    found = ppo.value_loss(values, old_values, returns, torch.tensor([[1.0, 0.0]]), 0.2)
    found.backward()
    assert found.item() == pytest.approx(expected)
    assert values.grad.tolist() == [[pytest.approx(slope), 0.0]]


def test_gradients_are_those_of_finite_differences():
    """Of both losses in double precision, at random points, which lie on no edge."""
    values, old_values, returns = (random_values(seed) for seed in (1, 2, 3))
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: ppo.value_loss(v, old_values, returns, MASK, 0.5), values)
    assert torch.autograd.gradcheck(lambda v: ppo.loss(v, old_values, returns, MASK, ppo.Args())[0], values)


def test_explained_variance_by_hand():
    """1 for a critic that knows all, 0 for any constant, below 0 for one that had better said nothing."""
    returns = torch.tensor([[0.0, 1.0, 1.0, 9.0], [0.0, 0.0, 1.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    assert ppo.explained_variance(returns, returns, mask) == 1.0
    assert ppo.explained_variance(torch.full_like(returns, 0.3), returns, mask) == pytest.approx(0.0, abs=1e-6)
    assert ppo.explained_variance(0.5 * returns, returns, mask) == pytest.approx(0.75)
    assert ppo.explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert ppo.explained_variance(returns, torch.ones(2, 4) + 1e-7 * returns, mask) is None


# ---------------------------------------------------------------------------------------------------------------------
# Whose value stands where
# ---------------------------------------------------------------------------------------------------------------------


def some_rollouts():
    """Three answers behind prompts of different lengths."""
    return common.assemble([[5, 6], [7, 8, 9], [4]], [[10, 11, 12], [13, 14], [15, 16, 17, 18]], 0, "cpu")


def test_a_value_is_read_before_its_token(model_folder, knowing_critic):
    """One column late, and the baseline knows the token that it judges: the gradient is biased, and nobody sees it."""
    critic = models.load_critic(ppo.Args(model=str(model_folder), device="cpu", gradient_checkpointing=False))
    rollouts = some_rollouts()
    values = ppo.completion_values(critic, rollouts, [2, 0, 1])
    assert values.shape == rollouts.ids.shape
    head = critic.get_output_embeddings().weight[0]
    for found, row in zip(values, [2, 0, 1]):
        length = int(rollouts.attention_mask[row].sum())
        hidden = critic.model(rollouts.ids[row, None, :length]).last_hidden_state[0]
        for t, inside in enumerate(rollouts.mask[row].tolist()):
            expected = (hidden[t - 1] @ head).item() if inside else 0.0
            assert found[t].item() == pytest.approx(expected, abs=1e-5)


def test_the_critic_is_the_starting_model_with_one_row(model_folder):
    """Its own copy: sharing a tensor with the policy, a step of one would move the other. It starts at value 0."""
    args = ppo.Args(model=str(model_folder), device="cpu")
    critic = models.load_critic(args)
    model, _ = load_model(str(model_folder), "cpu")
    assert critic.get_output_embeddings().weight.shape == (1, model.config.hidden_size)
    for name, parameter in critic.model.named_parameters():
        assert torch.equal(parameter, model.model.get_parameter(name))
    assert not ppo.completion_values(critic, some_rollouts(), [0, 1]).any()
    names = [slot.name for slot in Optimizer(critic, args).slots]
    assert "lm_head.weight" in names and "model.embed_tokens.weight" in names


# ---------------------------------------------------------------------------------------------------------------------
# The loop: what reaches the optimizers
# ---------------------------------------------------------------------------------------------------------------------


def textbook_values(model_folder, rollouts):
    """(critic, values [B, T-1] of every token but the first): the whole batch at once."""
    critic = models.load_critic(ppo.Args(model=str(model_folder), device="cpu", gradient_checkpointing=False))
    inputs = dict(input_ids=rollouts.ids, attention_mask=rollouts.attention_mask)
    return critic, critic(**inputs).logits[:, :-1, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_one_step_is_the_objective(temperature, model_folder, data, knowing_critic):
    """Policy and critic against a textbook: whitened R - V, and half the squared error, over all completion tokens."""
    seen = watch(ppo, settings_for(model_folder, data, temperature=temperature))
    rollouts = seen.rollouts[0]
    model, logps, _, mask = textbook(model_folder, rollouts, temperature)
    critic, values = textbook_values(model_folder, rollouts)
    error = GIVEN.view(-1, 1) - values
    tokens = mask.bool()
    A = error.detach() - statistics.mean(error[tokens].tolist())
    masked_average(-A / statistics.stdev(error[tokens].tolist()) * logps, mask).backward()
    masked_average(0.5 * error**2, mask).backward()
    assert_same_gradients(policies(seen)[0], gradients_of(model), 1e-5)
    assert_same_gradients(critics(seen)[0], gradients_of(critic), 1e-5)


def test_decay_and_discount_reach_the_loop(model_folder, data, knowing_critic):
    """With lambda 0 a critic learns from its own next value: other returns, other advantages."""
    seen = watch(ppo, settings_for(model_folder, data, lam=0.0, gamma=0.9))
    rollouts = seen.rollouts[0]
    critic, values = textbook_values(model_folder, rollouts)
    mask = rollouts.mask[:, 1:]
    returns = torch.zeros_like(values)
    for row, reward in enumerate(GIVEN.flatten().tolist()):
        columns = mask[row].nonzero().flatten().tolist()
        for t in columns:
            returns[row, t] = reward if t == columns[-1] else 0.9 * values[row, t + 1].item()
    masked_average(0.5 * (returns - values) ** 2, mask).backward()
    assert_same_gradients(critics(seen)[0], gradients_of(critic), 1e-5)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_micro_batches_do_not_change_the_gradient(minibatches, model_folder, data, knowing_critic):
    """A mean of means: results that change with the memory at hand. The normaliser is the mini-batch's tokens."""

    def run(budget):
        rates = dict(learning_rate=0.0, critic_learning_rate=0.0, num_minibatches=minibatches)
        seen = watch(ppo, settings_for(model_folder, data, micro_batch_tokens=budget, output_dir=f"{budget}", **rates))
        assert len(seen.gradients) == 2 * minibatches
        return seen

    objectives.assert_gradient_is_free_of_micro_batches(run, tolerance=5e-6)


def test_every_epoch_passes_over_every_minibatch(model_folder, data, knowing_critic):
    """At rates of 0 the second pass is the first; and the old values and log-probs are those of the beginning."""
    rates = dict(learning_rate=0.0, critic_learning_rate=0.0, num_minibatches=2, epochs=2)
    seen = watch(ppo, settings_for(model_folder, data, **rates))
    assert len(seen.gradients) == 8 and read_jsonl("run/metrics.jsonl")[0]["optimizer_steps"] == 4
    for first, second in zip(seen.gradients[:4], seen.gradients[4:], strict=True):
        assert_same_gradients(first, second, 1e-9)


def test_old_numbers_come_before_the_first_update(model_folder, data, monkeypatch):
    """Log-probs and values taken again for each mini-batch keep every ratio at 1: nothing is ever clipped."""
    ratios = objectives.log_ratios(ppo, monkeypatch)
    moved = []
    real_loss = ppo.value_loss

    def value_loss(values, old_values, *rest):
        moved.append(float((values - old_values).detach().abs().max()))
        return real_loss(values, old_values, *rest)

    monkeypatch.setattr(ppo, "value_loss", value_loss)
    rates = dict(learning_rate=1e-2, critic_learning_rate=1e-2, num_minibatches=4, micro_batch_tokens=10**6)
    watch(ppo, settings_for(model_folder, data, **rates))
    assert len(ratios) == len(moved) == 4
    assert ratios[0] < 1e-5 and min(ratios[1:]) > 1e-2
    assert moved[0] < 1e-5 and min(moved[1:]) > 1e-3


def test_the_critic_learns_at_its_own_rate(model_folder, data):
    """One rate for both: ten times too small for the critic, or ten times too large for the policy."""
    watch(ppo, settings_for(model_folder, data, learning_rate=0.0, critic_learning_rate=1e-2))
    start, _ = load_model(str(model_folder), "cpu")
    trained, _ = load_model("run", "cpu")
    assert all(torch.equal(old, new) for old, new in zip(start.parameters(), trained.parameters(), strict=True))
    head = torch.load("run/critic.pt", weights_only=True)["lm_head.weight"]["master"]
    assert head.abs().max() == pytest.approx(1e-2, rel=1e-3)  # Adam's first step, from 0


def test_the_policy_waits_while_the_critic_warms_up(model_folder, data, capsys):
    """A critic that knows nothing yet gives the noisiest advantages: for so many steps it learns alone."""
    args = settings_for(model_folder, data, max_steps=3, critic_warmup=2, save_steps=1, save_total_limit=0)
    seen = watch(ppo, args)
    assert len(seen.gradients) == 4  # critic, critic, both
    start, waited, trained = (load_model(str(path), "cpu")[0] for path in (model_folder, "run/checkpoint-2", "run"))
    for old, same, new in zip(start.parameters(), waited.parameters(), trained.parameters(), strict=True):
        assert torch.equal(old, same) and not torch.equal(same, new)
    records = read_jsonl("run/metrics.jsonl")
    assert [record["phase"] for record in records] == ["warm-up", "warm-up", "whole"]
    assert [record["optimizer_steps"] for record in records] == [0, 0, 1]
    assert "no signal" not in capsys.readouterr().err


def test_a_critic_learns_what_can_be_seen(model_folder, data, monkeypatch):
    """Answers with a 3 in them are rewarded: from the digit on, the reward is known, and a critic comes to foretell it.
    A value read at the wrong column, of the wrong row or with the wrong sign explains nothing."""

    def grade_rollouts(rollouts, problems, *rest):
        rewards = torch.tensor([float("3" in text) for text in rollouts.texts])
        return ["right" if reward else "wrong" for reward in rewards], rewards.view(len(problems), -1)

    monkeypatch.setattr(common, "grade_rollouts", grade_rollouts)
    rates = dict(learning_rate=0.0, critic_learning_rate=3e-3, num_minibatches=2)
    ppo.main(settings_for(model_folder, data, max_steps=16, num_generations=8, **rates))
    records = read_jsonl("run/metrics.jsonl")
    explained = [record["explained_variance"] for record in records]
    assert abs(explained[0]) < 1e-6 and min(explained[-3:]) > 0.15  # two of five tokens have seen it: 0.4 at best
    assert records[-1]["value_loss"] < 0.6 * records[0]["value_loss"]


def test_one_sample_per_prompt_is_enough(model_folder, data):
    """No group is compared: a sample each for more prompts is no mistake."""
    ppo.main(settings_for(model_folder, data, num_generations=1, num_prompts=8))
    record = read_jsonl("run/metrics.jsonl")[0]
    assert record["grad_norm"] > 0 and record["critic_grad_norm"] > 0


def test_the_logged_advantage_is_the_mean_over_the_tokens(model_folder, data):
    seen = watch(ppo, settings_for(model_folder, data))
    lengths = seen.rollouts[0].lengths
    expected = grpo.advantages(GIVEN, lengths.view(4, 4), "batch_whitened").flatten().tolist()
    logged = [answer["advantage"] for answer in read_jsonl("run/completions.jsonl")]
    assert logged == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The critic is part of the run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_its_critic_back(dtype, model_folder, data):
    """A critic that starts again from nothing, or without its moments: a kink in every curve. In bf16 its weights come
    back from their masters."""
    options = dict(max_steps=3, save_steps=1, save_total_limit=0, dtype=dtype, lam=0.9, num_minibatches=2)
    ppo.main(settings_for(model_folder, data, output_dir="whole", **options))
    interrupt(ppo, settings_for(model_folder, data, output_dir="cut", **options), 2)
    assert Path("cut/checkpoint-2/critic.pt").is_file()
    ppo.main(settings_for(model_folder, data, output_dir="cut", **options))
    assert_same_run("cut", "whole")
    ours, theirs = (torch.load(f"{folder}/critic.pt", weights_only=True) for folder in ("cut", "whole"))
    for name, slot in theirs.items():
        assert torch.equal(ours[name]["master"], slot["master"]), name
        for moment, value in slot["adam"]["state"][0].items():
            assert torch.equal(ours[name]["adam"]["state"][0][moment], value), (name, moment)
    assert math.isfinite(read_jsonl("cut/metrics.jsonl")[-1]["value_loss"])
