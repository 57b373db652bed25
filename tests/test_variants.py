"""The variants of the trunk: each new equation by hand, against the trunk where the two must agree, and in the loop."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL, arguments, command_line, read_jsonl, run_script, write_jsonl
from objectives import GIVEN, assert_same_gradients, gradients_of, masked_average, textbook, watch

# Tests of the trunk's equations and loop that hold for every variant: the fixture `script` decides.
from test_grpo import (  # noqa: F401
    test_advantages_by_hand,
    test_checkpointing_does_not_change_the_gradient,
    test_equal_rewards_give_exactly_no_advantage,
    test_micro_batches_do_not_change_the_gradient,
    test_one_step_raises_what_was_rewarded,
    test_only_log_probs_hold_a_graph_during_backward,
    test_ratios_start_at_exactly_one_in_bf16,
    test_reference_is_read_at_the_policys_temperature,
)

import common
import grpo
from plumbing.rollouts import replace_rows
from plumbing.runs import step_of
from variants import cispo, dapo, gspo

VARIANTS = [cispo, dapo, gspo]


@pytest.fixture(params=VARIANTS, ids=["cispo", "dapo", "gspo"])
def script(request, monkeypatch):
    if request.param is dapo:  # what it adds before the loss has tests of its own
        monkeypatch.setitem(dapo.EMBEDDED, "extra_rounds", 0)
        monkeypatch.setitem(dapo.EMBEDDED, "overlong_share", 0.0)
    return request.param


def one_step(script, model_folder, data, **overrides):
    """Args for one step on the four prompts of GIVEN."""
    return arguments(script, model_folder, data, **dict(num_prompts=4, max_steps=1) | overrides)


def random_tokens(columns=1):
    """(logps, old_logps, advantages, mask, ref_logps) of 6 answers in double precision."""
    generator = torch.Generator().manual_seed(0)
    logps, old_logps, ref_logps = torch.randn(3, 6, 9, generator=generator, dtype=torch.float64) - 3
    old_logps = logps + 0.4 * (old_logps - logps)
    A = torch.randn(6, columns, generator=generator, dtype=torch.float64)
    mask = (torch.rand(6, 9, generator=generator) < 0.7).double()
    mask[:, 0] = 1.0  # no answer is empty
    return logps.requires_grad_(), old_logps, A, mask, ref_logps


def numbers(**overrides):
    """What a loss may read."""
    return SimpleNamespace(**dict(epsilon=0.2, epsilon_high=0.3, delta=10.0, beta=0.0) | overrides)


# ---------------------------------------------------------------------------------------------------------------------
# CISPO
# ---------------------------------------------------------------------------------------------------------------------


def test_the_weights_of_cispo_are_the_papers():
    """No bound below; and what is above 0 is bound, or there would be nothing to its name."""
    args = cispo.Args()
    assert (args.epsilon, args.epsilon_high) == (1.0, 0.28)
    assert not hasattr(args, "delta")


@pytest.mark.parametrize(
    "A, ratio, weight",
    [
        (1.0, 1.0, 1.0),
        (1.0, 1.2, 1.2),
        (1.0, 3.0, 1.3),  # the trunk gives this token up; here its weight is bounded
        (-1.0, 3.0, 1.3),
        (1.0, 0.5, 0.8),
        (-1.0, 0.5, 0.8),  # and this one, too
    ],
)
def test_every_token_keeps_a_gradient(A, ratio, weight):
    """A weight that is not detached, that is clipped on one side only, or a minimum left over from the trunk."""
    logps = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    old_logps = logps.detach() - math.log(ratio)
    value, _ = cispo.loss(logps, old_logps, torch.tensor([[A]]), torch.tensor([[1.0, 0.0]]), numbers())
    value.backward()
    assert value.item() == pytest.approx(-A * weight * -1.0)
    assert logps.grad.tolist() == [[pytest.approx(-A * weight), 0.0]]


@pytest.mark.parametrize("columns", [1, 9], ids=["advantage_per_row", "advantage_per_token"])
def test_cispo_gradient_is_the_weight_times_that_of_the_log_prob(columns):
    """Token by token in Python floats; with the paper's epsilon of 1 a small ratio is not lifted."""
    logps, old_logps, A, mask, _ = random_tokens(columns)
    for epsilon in (0.2, 1.0):
        logps.grad = None
        value, metrics = cispo.loss(logps, old_logps, A, mask, numbers(epsilon=epsilon))
        value.backward()
        clipped = 0
        for row in range(6):
            for t in range(9):
                ratio = math.exp(logps[row, t].item() - old_logps[row, t].item())
                weight = min(1.3, max(1 - epsilon, ratio))
                clipped += mask[row, t].item() * (weight != ratio)
                expected = -A.expand(6, 9)[row, t].item() * weight * mask[row, t].item()
                assert logps.grad[row, t].item() == pytest.approx(expected)
        assert metrics["clip_share"] == clipped > 0


def test_cispo_on_policy_is_the_trunk(model_folder, data):
    """Where all ratios are 1 the two objectives have one gradient: anything else would be a second difference."""
    trunk, ours = (watch(module, one_step(module, model_folder, data, overwrite=True)) for module in (grpo, cispo))
    assert_same_gradients(ours.gradients[0], trunk.gradients[0])


# ---------------------------------------------------------------------------------------------------------------------
# GSPO
# ---------------------------------------------------------------------------------------------------------------------


def test_the_clip_range_of_gspo_is_the_papers():
    assert (gspo.Args().epsilon, gspo.Args().epsilon_high) == (3e-4, 4e-4)


def sequence_ratio(logps, old_logps, mask):
    """(pi(o) / pi_old(o)) ** (1 / |o|) of one answer, as it stands in the paper."""
    tokens = mask.bool()
    ratio = math.exp(logps[tokens].sum().item()) / math.exp(old_logps[tokens].sum().item())
    return ratio ** (1 / int(tokens.sum()))


def test_gspo_loss_is_that_of_the_whole_answer():
    """A sum for a mean in the exponent, padding in the length, or a loss per token: each is another number."""
    logps, old_logps, A, mask, _ = random_tokens()
    value, metrics = gspo.loss(logps, old_logps, A, mask, numbers())
    expected = 0.0
    clipped = 0.0
    for row in range(6):
        s = sequence_ratio(logps[row].detach(), old_logps[row], mask[row])
        a = A[row].item()
        surrogate = -a * s
        bounded = -a * min(1.3, max(0.8, s))
        expected += max(surrogate, bounded)
        clipped += (bounded > surrogate) * mask[row].sum().item()
    assert value.item() == pytest.approx(expected)
    assert metrics["clip_share"] == clipped > 0  # tokens of the answers that are clipped


def test_gspo_gradient_is_one_weight_for_all_tokens():
    """A s / |o| on every token of an answer inside the range, nothing on those of one outside."""
    logps, old_logps, A, mask, _ = random_tokens()
    value, _ = gspo.loss(logps, old_logps, A, mask, numbers())
    value.backward()
    outside = 0
    for row in range(6):
        s = sequence_ratio(logps[row].detach(), old_logps[row], mask[row])
        a = A[row].item()
        gone = (a > 0 and s > 1.3) or (a < 0 and s < 0.8)
        outside += gone
        expected = (0.0 if gone else -a * s / mask[row].sum().item()) * mask[row]
        assert torch.allclose(logps.grad[row], expected)
    assert 0 < outside < 6


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gspo_gradient_is_that_of_finite_differences(beta):
    logps, old_logps, A, mask, ref_logps = random_tokens()
    args = numbers(beta=beta)
    assert torch.autograd.gradcheck(lambda x: gspo.loss(x, old_logps, A, mask, args, ref_logps)[0], logps)


def test_gspo_gives_up_what_is_far_off():
    """The dual clip, of an answer: with A < 0 the surrogate has no upper bound."""
    logps = torch.tensor([[-1.0, -1.0]])
    old_logps = logps - torch.tensor([[math.log(400.0), 0.0]])  # the mean ratio is 20
    value, _ = gspo.loss(logps, old_logps, torch.tensor([[-2.0]]), torch.ones(1, 2), numbers())
    assert value.item() == pytest.approx(20.0)


def test_gspo_step_is_a_mean_over_answers(model_folder, data):
    """The whole loop against a textbook: every answer counts alike, those without advantage in the number, too."""
    seen = watch(gspo, one_step(gspo, model_folder, data))
    rollouts = seen.rollouts[0]
    assert len(set(rollouts.lengths.tolist())) > 1
    model, logps, _, mask = textbook(model_folder, rollouts)
    A = grpo.advantages(GIVEN, rollouts.lengths.view(4, 4)).view(-1)
    per_answer = (logps * mask).sum(1) / mask.sum(1)
    (-A * per_answer).mean().backward()
    assert_same_gradients(seen.gradients[0], gradients_of(model), 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# DAPO
# ---------------------------------------------------------------------------------------------------------------------


def test_the_defaults_of_dapo_are_the_papers():
    args = dapo.Args()
    assert (args.epsilon, args.epsilon_high, args.beta) == (0.2, 0.28, 0.0)
    assert args.overlong_share == 4096 / 20480


@pytest.mark.parametrize(
    "length, expected",
    [(1, 0.0), (60, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0)],
)
def test_the_penalty_falls_over_the_end_of_the_limit(length, expected):
    """The limit 100, of it the last 20: the paper's eq. 13, number by number."""
    assert dapo.penalty(torch.tensor([length]), 100, 0.2).item() == pytest.approx(expected)


def test_no_share_is_no_penalty():
    assert not dapo.penalty(torch.arange(1, 101), 100, 0.0).any()


def test_late_answers_lose_reward(model_folder, data):
    """The penalty goes into the advantages, and into nothing that is logged: accuracy stays accuracy."""
    args = one_step(dapo, model_folder, data, overlong_share=0.9, extra_rounds=0)
    seen = watch(dapo, args)
    rollouts = seen.rollouts[0]
    late = torch.tensor([max(-1.0, min(0.0, (1.0 - length) / 9)) for length in rollouts.lengths.tolist()])
    A = grpo.advantages(GIVEN + late.view(4, 4), rollouts.lengths.view(4, 4)).view(-1, 1)
    model, logps, _, mask = textbook(model_folder, rollouts)
    masked_average(-A * logps, mask).backward()
    assert_same_gradients(seen.gradients[0], gradients_of(model), 1e-5)
    record = read_jsonl("run/metrics.jsonl")[0]
    assert record["reward"] == record["accuracy"] == GIVEN.mean().item()


def test_silent_prompts_make_room_for_others(model_folder, data):
    """One prompt of GIVEN teaches nothing: it alone is replaced, and its answers are those of the new prompt."""
    full = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
    seen = watch(dapo, one_step(dapo, model_folder, data, overlong_share=0.0), GIVEN, full)
    first, second = seen.rollouts
    assert len(first.ids) == 16 and len(second.ids) == 4
    rollouts = replace_rows(first, [4, 5, 6, 7], second)
    assert rollouts.texts == [answer["text"] for answer in read_jsonl("run/completions.jsonl")]
    A = grpo.advantages(full, rollouts.lengths.view(4, 4)).view(-1, 1)
    model, logps, _, mask = textbook(model_folder, rollouts)
    masked_average(-A * logps, mask).backward()
    assert_same_gradients(seen.gradients[0], gradients_of(model), 1e-5)
    record = read_jsonl("run/metrics.jsonl")[0]
    assert record["extra_rounds"] == 1 and record["zero_variance_share"] == 0 and record["logp_gap"] < 1e-5
    assert record["seconds_by_stage"].keys() == {"sampling", "grading", "old_logps", "update"}


def test_replaced_prompts_are_new_ones_with_their_own_answers(model_folder, data, tokenizer):
    """Prompts of --data, drawn anew in every round; what is graded and logged is what was asked last."""
    problems = {row["problem"]: row["answer"] for row in read_jsonl(data)}
    asked = []
    for rounds in (0, 1, 2):
        options = dict(extra_rounds=rounds, output_dir=f"{rounds}", overlong_share=0.0)
        seen = watch(dapo, one_step(dapo, model_folder, data, **options), torch.ones(4, 4))
        answers = read_jsonl(f"{rounds}/completions.jsonl")
        for ids, answer in zip(seen.rollouts[-1].ids, answers, strict=True):
            assert problems[answer["problem"]] == answer["gold"]
            assert tokenizer.decode(ids).startswith(f"<|user|>{answer['problem']}<|assistant|>")
        asked.append([answer["problem"] for answer in answers])
    assert asked[0] != asked[1] != asked[2] != asked[0]


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_task_that_is_solved_ends_the_search(rounds, model_folder, data):
    """Every prompt is solved, or none can be: without a bound the step never ends. Then it takes no update."""
    same_problem = write_jsonl(Path("same.jsonl"), read_jsonl(data)[:1] * 12)  # or other prompts would hide one seed
    args = one_step(dapo, model_folder, same_problem, extra_rounds=rounds, overlong_share=0.0)
    seen = watch(dapo, args, torch.ones(4, 4))
    assert [len(rollouts.ids) for rollouts in seen.rollouts] == [16] * (1 + rounds)
    draws = [rollouts.ids.tolist() for rollouts in seen.rollouts]
    assert all(draw not in draws[:i] for i, draw in enumerate(draws))  # another seed for each
    assert seen.gradients == [] and read_jsonl("run/metrics.jsonl")[0]["extra_rounds"] == rounds


def test_without_its_additions_dapo_is_the_trunk(model_folder, data):
    """Bit for bit: what differs is what its paper is about."""
    settings = dict(num_minibatches=2, max_steps=2, extra_rounds=0, overlong_share=0.0, epsilon_high=None)
    ours = watch(dapo, one_step(dapo, model_folder, data, output_dir="ours", **settings))
    trunk = dict(num_minibatches=2, max_steps=2, output_dir="trunk")
    theirs = watch(grpo, one_step(grpo, model_folder, data, **trunk))
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("swapped", [False, True], ids=["wider", "narrower"])
def test_rows_of_another_batch_keep_what_belongs_to_them(swapped):
    """Padding that is scored, an answer with another's log-probs, or the old batch changed behind its owner's back."""

    def batch(completions, number):
        rollouts = common.assemble([[5, 6]] * len(completions), completions, 0, "cpu")
        rollouts.logps = -number * rollouts.mask
        rollouts.entropy = 2 * number * rollouts.mask
        rollouts.finished = torch.tensor([number == 1] * len(completions))
        rollouts.texts = [f"{number}: {completion}" for completion in completions]
        return rollouts

    one, other = batch([[7], [8, 9], [10]], 1), batch([[11, 12, 13, 14], [15]], 2)
    if swapped:
        one, other = batch([[7], [8, 9, 1, 2, 3], [10]], 1), batch([[11], [15]], 2)
    before = one.ids.clone()
    found = replace_rows(one, [2, 0], other)
    assert torch.equal(one.ids, before) and one.texts[0] == "1: [7]"
    assert found.texts == [other.texts[1], one.texts[1], other.texts[0]]
    assert found.finished.tolist() == [False, True, False]
    for row, (source, theirs) in enumerate([(other, 1), (one, 1), (other, 0)]):
        width = source.ids.shape[1]
        for name in ("ids", "attention_mask", "mask", "logps", "entropy"):
            assert torch.equal(getattr(found, name)[row, :width], getattr(source, name)[theirs]), name
            assert not getattr(found, name)[row, width:].any()
        assert found.lengths[row] == source.lengths[theirs]


# ---------------------------------------------------------------------------------------------------------------------
# As commands
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cispo", "gspo", "dapo"])
def test_a_variant_runs_to_its_end(name, model_folder, data):
    """In process: two steps of several mini-batches, an evaluation, and a model that has moved."""
    module = dict(cispo=cispo, gspo=gspo, dapo=dapo)[name]
    module.main(arguments(module, model_folder, data, num_prompts=6, num_minibatches=2, eval_steps=2))
    records = read_jsonl("run/metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 2]
    assert records[1]["grad_norm"] > 0 and records[-1]["kl_to_start"] > 0


def test_a_variant_starts_from_anywhere(model_folder, data):
    """`python variants/gspo.py`: Python looks for modules beside the script, where none of this project's are."""
    known = gspo.Args.__dataclass_fields__
    paths = dict(model=model_folder, data=data, eval_data=data, output_dir="run")
    options = {name: value for name, value in (SMALL | paths).items() if name in known}
    done = run_script("variants/gspo.py", *command_line(**options))
    assert done.returncode == 0, done.stderr
    assert step_of(Path("run")) == 2
