"""The equations: advantages and loss by hand, against an independent reference, and against exact enumeration."""

import itertools
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import arguments, read_jsonl

import bupo
import common
import grpo

SCRIPTS = pytest.mark.parametrize("script", [grpo, bupo], ids=["grpo", "bupo"])
ESTIMATORS = ["group_normalised", "group_centred", "leave_one_out", "batch_whitened"]


# ---------------------------------------------------------------------------------------------------------------------
# Advantages
# ---------------------------------------------------------------------------------------------------------------------

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
LENGTHS = torch.tensor([[1, 2, 3, 4], [5, 1, 1, 1], [2, 2, 1, 1]])


@SCRIPTS
def test_advantages_by_hand(script):
    """The biased standard deviation, a baseline over the batch instead of the group, or one that is left out."""
    a, b = 0.5 / math.sqrt(1 / 3), 0.5  # std of [1,0,0,1] with n - 1: sqrt(1/3); of [1,0,0,0]: 1/2
    expected = {
        "group_normalised": [[a, -a, -a, a], [0.75 / b, -0.25 / b, -0.25 / b, -0.25 / b], [0.0] * 4],
        "group_centred": [[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25], [0.0] * 4],
        "leave_one_out": [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [1.0, -1 / 3, -1 / 3, -1 / 3], [0.0] * 4],
    }
    tokens = [1.0] * (1 + 4 + 5 + 6) + [0.0] * (2 + 3 + 3)  # one entry per token: 16 in right answers, 8 in wrong ones
    mean, std = statistics.mean(tokens), statistics.stdev(tokens)
    expected["batch_whitened"] = [[(r - mean) / std for r in row] for row in REWARDS.tolist()]
    for estimator in ESTIMATORS:
        A = script.advantages(REWARDS, LENGTHS, estimator)
        assert A.shape == REWARDS.shape
        assert torch.allclose(A, torch.tensor(expected[estimator]), atol=1e-5), estimator
    assert torch.equal(script.advantages(REWARDS, LENGTHS), script.advantages(REWARDS, LENGTHS, "group_normalised"))


@SCRIPTS
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_against_a_float64_reference(script, estimator):
    """Rewards other than 0 and 1 and groups of other sizes, from Python's own statistics."""
    generator = torch.Generator().manual_seed(0)
    for P, G in ((1, 2), (3, 5), (4, 16)):
        rewards = torch.rand(P, G, generator=generator)
        lengths = torch.randint(1, 9, (P, G), generator=generator)
        pairs = zip(rewards.flatten().tolist(), lengths.flatten().tolist())
        every_token = [reward for reward, length in pairs for _ in range(length)]
        A = script.advantages(rewards, lengths, estimator).tolist()
        for p, g in itertools.product(range(P), range(G)):
            row = rewards[p].tolist()
            r, others = row[g], row[:g] + row[g + 1 :]
            expected = {
                "group_normalised": lambda: (r - statistics.mean(row)) / (statistics.stdev(row) + 1e-6),
                "group_centred": lambda: r - statistics.mean(row),
                "leave_one_out": lambda: r - statistics.mean(others),
                "batch_whitened": lambda: (r - statistics.mean(every_token)) / statistics.stdev(every_token),
            }[estimator]()
            assert A[p][g] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@SCRIPTS
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("reward, G", [(1.0, 8), (0.0, 8), (0.95, 7), (0.01, 12), (0.1, 3)])
def test_equal_rewards_give_exactly_no_advantage(script, estimator, reward, G):
    """The float mean of seven 0.95 is not 0.95: noise over its own std is a confident push at random."""
    A = script.advantages(torch.full((3, G), reward), torch.randint(1, 9, (3, G)), estimator)
    assert not A.any()


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def args_of(**overrides):
    """The four numbers a loss may read, and nothing else."""
    return SimpleNamespace(**dict(epsilon=0.2, epsilon_high=None, delta=10.0, beta=0.0) | overrides)


@SCRIPTS
@pytest.mark.parametrize(
    "A, ratio, overrides, expected",
    [
        (1.0, 1.0, {}, -1.0),
        (1.0, 1.1, {}, -1.1),  # inside the clip range
        (1.0, 1.5, {}, -1.2),  # enough: clipped
        (1.0, 0.5, {}, -0.5),  # moving the wrong way is never clipped
        (-1.0, 1.5, {}, 1.5),
        (-1.0, 0.5, {}, 0.8),  # clipped
        (-2.0, 5.0, {}, 10.0),
        (-2.0, 20.0, {}, 20.0),  # dual clip: -A delta, not -A r = 40
        (2.0, 20.0, {}, -2.4),  # the dual clip is for A < 0 only
        (-1.0, 5.0, {"delta": 3.0}, 3.0),
        (1.0, 1.5, {"epsilon_high": 0.28}, -1.28),
        (-1.0, 0.5, {"epsilon_high": 0.28}, 0.8),  # clip-higher leaves the lower end alone
        (1.0, 1.5, {"epsilon": 0.1}, -1.1),  # no epsilon_high: epsilon on both sides
        (0.0, 1.5, {}, 0.0),
    ],
)
def test_loss_of_one_token_by_hand(script, A, ratio, overrides, expected):
    """A missing clip, one on the wrong side, or no dual clip: single tokens throw the policy far away."""
    logps = torch.tensor([[-1.0, -2.0]])
    old_logps = logps - torch.tensor([[math.log(ratio), 3.0]])
    value, _ = script.loss(logps, old_logps, torch.tensor([[A]]), torch.tensor([[1.0, 0.0]]), args_of(**overrides))
    assert value.item() == pytest.approx(expected, abs=1e-5)


def reference_loss(logps, old_logps, advantages, mask, args, ref_logps):
    """The objective token by token in Python floats."""
    total, high = 0.0, args.epsilon if args.epsilon_high is None else args.epsilon_high
    for b, t in itertools.product(range(len(mask)), range(len(mask[0]))):
        if mask[b][t]:
            A, r = advantages[b][t], math.exp(min(20.0, max(-20.0, logps[b][t] - old_logps[b][t])))
            value = max(-A * r, -A * min(1 + high, max(1 - args.epsilon, r)))
            total += min(value, -A * args.delta) if A < 0 else value
            if ref_logps is not None:
                x = min(20.0, max(-20.0, ref_logps[b][t] - logps[b][t]))
                total += args.beta * min(10.0, max(-10.0, math.exp(x) - x - 1))
    return total


@SCRIPTS
@pytest.mark.parametrize("per_token", [False, True], ids=["advantage_per_row", "advantage_per_token"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_against_a_float64_reference(script, per_token, beta):
    """A mean where a sum is meant (it depends on the micro-batch), padding in the loss, or the KL the wrong way."""
    generator = torch.Generator().manual_seed(0)
    logps, old_logps, ref_logps = (2 * torch.randn(6, 9, generator=generator) - 3 for _ in range(3))
    A = torch.randn(6, 9 if per_token else 1, generator=generator)
    mask = (torch.rand(6, 9, generator=generator) < 0.7).float()
    args = args_of(epsilon_high=0.28, delta=4.0, beta=beta)
    reference = [x.double().tolist() for x in (logps, old_logps, A.expand(6, 9), mask)]
    for ref in (None, ref_logps):
        value, metrics = script.loss(logps, old_logps, A, mask, args, ref)
        expected = reference_loss(*reference, args, None if ref is None else ref.double().tolist())
        assert value.dim() == 0 and value.item() == pytest.approx(expected, rel=1e-5)
        assert all(isinstance(v, float) for v in metrics.values())


@SCRIPTS
def test_loss_counts_the_clipped_tokens(script):
    """clip_share is the number to watch when a run goes wrong: clipped completion tokens, no padding."""
    logps = torch.tensor([[1.5, 1.1, 0.5, 1.5], [0.5, 0.9, 1.5, 0.5]]).log()
    mask, A = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]), torch.tensor([[1.0], [-1.0]])
    _, metrics = script.loss(logps, torch.zeros(2, 4), A, mask, args_of())
    assert metrics["clip_share"] == 3.0  # two of the first row, one of the second: sums over tokens


@SCRIPTS
@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("gap", [119.0, -119.0])
def test_huge_log_prob_gaps_keep_gradients_finite(script, A, gap):
    """exp(119) is infinite and inf * 0 is nan: unconverged internal policies do reach such gaps."""
    logps = torch.tensor([[-1.0, -120.0 if gap < 0 else -0.5]], requires_grad=True)
    old_logps, ref_logps = torch.tensor([[-1.0, logps[0, 1].item() - gap]]), torch.tensor([[-1.0, -1.0 - gap]])
    value, _ = script.loss(logps, old_logps, torch.tensor([[A]]), torch.ones(1, 2), args_of(beta=0.1), ref_logps)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logps.grad).all()
    assert logps.grad[0, 0] == pytest.approx(-A)


@SCRIPTS
def test_on_policy_gradient_is_reinforce(script):
    """With old_logps = logps.detach() the ratio is 1, the gradient -A: a detached numerator would give none."""
    generator = torch.Generator().manual_seed(0)
    logps = (torch.randn(5, 7, generator=generator) - 3).requires_grad_()
    A, mask = torch.randn(5, 1, generator=generator), (torch.rand(5, 7, generator=generator) < 0.7).float()
    script.loss(logps, logps.detach(), A, mask, args_of())[0].backward()
    assert torch.allclose(logps.grad, -A * mask, atol=1e-6)


def test_reference_term_is_the_kl():
    """k3 averaged over the policy is KL(pi || pi_ref); with the two swapped it pulls towards a third distribution."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.log_softmax(torch.randn(1, 6, generator=generator), -1) for _ in range(2))
    zero = torch.zeros(1, 1)
    expected = float((policy.exp() * (policy - reference)).sum())
    found = 0.0
    for v in range(6):
        logps, ref_logps = policy[:, [v]], reference[:, [v]]
        found += float(logps.exp() * grpo.loss(logps, logps, zero, zero + 1, args_of(beta=1.0), ref_logps)[0])
    assert found == pytest.approx(expected, rel=1e-5) and expected > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Exact enumeration: the estimator's expectation is the gradient of the expected reward
# ---------------------------------------------------------------------------------------------------------------------

# A policy small enough to write down: 4 tokens, of which 0 ends the answer; at most 3 tokens. A row of logits for each
# of the 1 + 3 + 9 prefixes without end token, and a random reward for each of the 40 completions.
PREFIXES = [p for n in range(3) for p in itertools.product((1, 2, 3), repeat=n)]
COMPLETIONS = [(*p, v) for p in PREFIXES for v in range(4) if v == 0 or len(p) == 2]
STATES = torch.tensor([[PREFIXES.index(y[:t]) if t < len(y) else 0 for t in range(3)] for y in COMPLETIONS])  # [40, 3]
TARGETS = torch.tensor([[y[t] if t < len(y) else 0 for t in range(3)] for y in COMPLETIONS])
MASK = torch.tensor([[float(t < len(y)) for t in range(3)] for y in COMPLETIONS])


class Table(torch.nn.Module):
    """A language model whose hidden state is its prefix, one-hot; so the head's columns are the logits."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(len(PREFIXES), 4, bias=False)
        self.head.weight.data = torch.randn(4, len(PREFIXES), generator=torch.Generator().manual_seed(1))

    def get_output_embeddings(self):
        return self.head


def expected_reward(weight, rewards, temperature):
    """Sum over all completions of probability times reward, in float64 -> (value, probabilities, gradient)."""
    weight = weight.detach().double().requires_grad_()
    logps = torch.log_softmax(weight.t() / temperature, -1)[STATES, TARGETS]  # [40, 3]
    probabilities = (logps * MASK).sum(1).exp()
    value = (probabilities * rewards.double()).sum()
    return value.item(), probabilities.detach(), torch.autograd.grad(value, weight)[0]


def expected_gradient(script, estimator, temperature, loss_temperature, baseline=True):
    """The estimator's gradient averaged over all 40 x 40 groups of two samples -> (average, exact)."""
    model, n = Table(), len(COMPLETIONS)
    rewards = torch.rand(n, generator=torch.Generator().manual_seed(2))
    _, probabilities, exact = expected_reward(model.head.weight, rewards, temperature)
    assert probabilities.sum() == pytest.approx(1.0)
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))  # [1600, 2] groups
    lengths = MASK.sum(1).long()
    A = script.advantages(rewards[pairs], lengths[pairs], estimator) if baseline else rewards[pairs]
    # On-policy the loss is linear in A: weighing A by a group's probability weighs its gradient by it.
    weighed = (A.double() * probabilities[pairs].prod(1, keepdim=True)).float().flatten()[:, None]  # [3200, 1]
    rows = pairs.flatten()
    hidden = torch.eye(len(PREFIXES))[STATES[rows]]  # [3200, 3, 13]
    logps, _ = common.token_logps(model, hidden, TARGETS[rows], loss_temperature)
    value, _ = script.loss(logps, logps.detach(), weighed, MASK[rows], args_of())
    value.backward()
    return -model.head.weight.grad.double() / 2, exact  # a group's loss sums over two samples


def relative_error(found, exact):
    return float((found - exact).norm() / exact.norm())


@SCRIPTS
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("baseline", [True, False], ids=["leave_one_out", "no_baseline"])
def test_expected_estimate_is_the_gradient_of_the_expected_reward(script, temperature, baseline):
    """No sampling error to hide behind: a wrong sign, shift, mask, temperature or baseline is a wrong number here."""
    found, exact = expected_gradient(script, "leave_one_out", temperature, temperature, baseline)
    assert relative_error(found, exact) < 1e-6


def test_enumeration_notices_bugs():
    """The same comparison with well-known deviations put in: each must be far off, or it could not be seen."""
    found, exact = expected_gradient(grpo, "leave_one_out", temperature=0.6, loss_temperature=1.0)
    assert relative_error(found, exact) > 0.1  # sampled at 0.6, log-probs taken at 1
    found, exact = expected_gradient(grpo, "group_centred", 1.0, 1.0)
    assert relative_error(found, exact / 2) < 1e-6  # a mean that includes the sample itself shrinks it by (G - 1) / G
    found, exact = expected_gradient(grpo, "group_normalised", 1.0, 1.0)
    assert relative_error(found / found.norm(), exact / exact.norm()) > 0.1  # another direction: a choice, no bug


# ---------------------------------------------------------------------------------------------------------------------
# The loop: what reaches the optimizer
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def watch(monkeypatch):
    """Run a script with given rewards and record every gradient handed to the optimizer and every batch of rollouts."""

    def run(script, args, rewards):
        seen, models = SimpleNamespace(gradients=[], rollouts=[]), []

        def init(optimizer, model, *rest):
            models.append(model)
            real_init(optimizer, model, *rest)

        def step(optimizer, *rest):
            named = models[-1].named_parameters()
            seen.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
            return real_step(optimizer, *rest)

        def sample(*rest, **options):
            seen.rollouts.append(real_sample(*rest, **options))
            return seen.rollouts[-1]

        real_init, real_step, real_sample = common.Optimizer.__init__, common.Optimizer.step, common.sample
        with monkeypatch.context() as m:
            m.setattr(common.Optimizer, "__init__", init)
            m.setattr(common.Optimizer, "step", step)
            m.setattr(common, "sample", sample)
            m.setattr(
                common, "grade_rollouts", lambda rollouts, _: setattr(rollouts, "verdicts", []) or rewards.clone()
            )
            script.main(args)
        return seen

    return run


# Rewards of 4 prompts x 4 samples: the second group teaches nothing, whatever mini-batch it falls into.
GIVEN = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]])


def same_gradients(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    scale = max(float(g.abs().max()) for g in a.values())
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < tolerance * max(1.0, scale)


@pytest.mark.parametrize("script, internal", [(grpo, {}), (bupo, {"internal_steps": 1, "internal_layer": 1})])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_micro_batches_do_not_change_the_gradient(script, internal, minibatches, model_folder, data, watch):
    """A mean of means: results that change with the memory at hand. The normaliser is the mini-batch's tokens."""
    settings = dict(num_prompts=4, num_minibatches=minibatches, max_steps=1, learning_rate=0.0, **internal)
    runs = []
    for budget in (1, 60, 10**6):  # one row at a time, a few, all at once
        args = arguments(script, model_folder, data, micro_batch_tokens=budget, output_dir=f"{budget}", **settings)
        runs.append(watch(script, args, GIVEN))
    assert len(runs[0].gradients) == minibatches
    assert len(set(runs[0].rollouts[0].lengths.tolist())) > 1
    for run in runs[1:]:
        for a, b in zip(runs[0].gradients, run.gradients, strict=True):
            same_gradients(a, b, 5e-6 if internal else 1e-6)  # raw internal logits are larger, and so is their rounding


def test_checkpointing_does_not_change_the_gradient(model_folder, data, watch):
    """Recomputing the blocks saves memory and nothing else; in training mode it also drops the cache of the sampler."""
    settings = dict(num_prompts=4, max_steps=2, overwrite=True)
    stored, recomputed = (
        watch(bupo, arguments(bupo, model_folder, data, gradient_checkpointing=checkpointing, **settings), GIVEN)
        for checkpointing in (False, True)
    )
    assert torch.equal(stored.rollouts[0].ids, recomputed.rollouts[0].ids)
    same_gradients(stored.gradients[0], recomputed.gradients[0])


@pytest.mark.parametrize("estimator", ["group_normalised", "batch_whitened"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_one_step_is_the_objective(estimator, temperature, model_folder, data, watch):
    """The whole loop against ten lines of textbook: logits in full, every row included, the mean over all its tokens.

    Rows without advantage are skipped by the loop; dropping their tokens from the denominator is another objective.
    """
    settings = dict(num_prompts=4, max_steps=1, advantage=estimator, temperature=temperature)
    seen = watch(grpo, arguments(grpo, model_folder, data, **settings), GIVEN)
    rollouts = seen.rollouts[0]
    assert len(set(rollouts.lengths.tolist())) > 1
    model, _ = common.load_model(str(model_folder), "cpu", "float32")
    A = grpo.advantages(GIVEN, rollouts.lengths.view(4, 4), estimator).view(-1, 1)
    logits = model(input_ids=rollouts.ids, attention_mask=rollouts.attention_mask).logits[:, :-1] / temperature
    logps = torch.log_softmax(logits, -1).gather(-1, rollouts.ids[:, 1:, None]).squeeze(-1)
    mask = rollouts.mask[:, 1:]
    ((-A * logps * mask).sum() / mask.sum()).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    same_gradients(seen.gradients[0], expected, 1e-5)


@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normed"])
def test_internal_step_is_the_objective_of_the_block(norm, model_folder, data, watch):
    """Phase one against the textbook: raw state after block k times the head; samples of the whole policy."""
    steps = dict(num_prompts=4, max_steps=2, internal_steps=1, internal_layer=1, internal_norm=norm)
    seen = watch(bupo, arguments(bupo, model_folder, data, **steps), GIVEN)
    rollouts = seen.rollouts[0]
    model, _ = common.load_model(str(model_folder), "cpu", "float32")
    A = bupo.advantages(GIVEN, rollouts.lengths.view(4, 4)).view(-1, 1)
    inputs = dict(input_ids=rollouts.ids, attention_mask=rollouts.attention_mask)
    state = model(**inputs, output_hidden_states=True).hidden_states[2][:, :-1]
    logits = model.lm_head(model.model.norm(state) if norm else state)
    logps = torch.log_softmax(logits, -1).gather(-1, rollouts.ids[:, 1:, None]).squeeze(-1)
    mask = rollouts.mask[:, 1:]
    ((-A * logps * mask).sum() / mask.sum()).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert not any(name.startswith("model.layers.2.") for name in expected)
    assert ("model.norm.weight" in expected) == norm
    same_gradients(seen.gradients[0], expected, 1e-5)
    assert seen.gradients[1].keys() == dict(model.named_parameters()).keys()  # phase two trains everything


def test_old_log_probs_come_before_the_first_update(model_folder, data, watch, monkeypatch):
    """Old log-probs taken after an update, or again per mini-batch, keep every ratio at 1: nothing is ever clipped."""
    ratios = []
    real_loss = grpo.loss

    def loss(logps, old_logps, advantages, mask, *rest):
        ratios.append(float(((logps - old_logps).detach() * mask).abs().max()))
        return real_loss(logps, old_logps, advantages, mask, *rest)

    monkeypatch.setattr(grpo, "loss", loss)
    settings = dict(num_prompts=4, max_steps=1, num_minibatches=4, learning_rate=1e-2, micro_batch_tokens=10**6)
    seen = watch(grpo, arguments(grpo, model_folder, data, **settings), GIVEN)
    assert len(seen.gradients) == len(ratios) == 3  # one of the four mini-batches teaches nothing and takes no step
    assert ratios[0] < 1e-5 and min(ratios[1:]) > 1e-2


def test_no_internal_steps_is_the_trunk_bit_for_bit(model_folder, data, watch):
    """Anything bupo.py does differently in phase two is a second difference, beside the one its paper is about."""
    settings = dict(num_prompts=4, num_minibatches=2, max_steps=2)
    watch(grpo, arguments(grpo, model_folder, data, output_dir="trunk", **settings), GIVEN)
    watch(bupo, arguments(bupo, model_folder, data, output_dir="bottom_up", internal_steps=0, **settings), GIVEN)
    ours, trunk, start = (
        common.load_model(str(folder), "cpu")[0].state_dict() for folder in ("bottom_up", "trunk", model_folder)
    )
    assert all(torch.equal(ours[name], trunk[name]) for name in trunk)
    assert not all(torch.equal(ours[name], start[name]) for name in trunk)


def test_reference_holds_the_policy_back(model_folder, data, watch):
    """A reference that is trained along, or a beta that reaches nothing, lets the policy drift as far as without."""
    drift = {}
    for beta in (0.0, 100.0):
        settings = dict(num_prompts=4, max_steps=6, learning_rate=3e-3, beta=beta, eval_steps=6)
        watch(grpo, arguments(grpo, model_folder, data, output_dir=f"beta{beta}", **settings), GIVEN)
        records = [r for r in read_jsonl(f"beta{beta}/metrics.jsonl") if "kl_to_start" in r]
        drift[beta] = records[-1]["kl_to_start"]
    assert drift[100.0] < 0.5 * drift[0.0]
    kl = [r["reference_kl"] for r in read_jsonl("beta100.0/metrics.jsonl") if "reference_kl" in r]
    assert abs(kl[0]) < 1e-6 < kl[1] and len(kl) == 6
