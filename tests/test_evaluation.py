"""Evaluation: the numbers by which runs are judged, on problems that nobody trained on."""

import pytest
import torch
from conftest import TOKENIZER, arguments, read_jsonl, tiny_model

import common
import grpo


def evaluations(folder="run"):
    return [record for record in read_jsonl(f"{folder}/metrics.jsonl") if "eval_accuracy" in record]


def test_accuracy_is_the_mean_over_all_answers(model_folder, data):
    """A mean over problems solved at least once, or over finished answers only, is another, better-looking number."""
    model, tokenizer = common.load_model(str(model_folder), "cpu")
    problems = common.load_problems(str(data))
    result = common.evaluate(model, tokenizer, problems, 6, 1.0, max_completion_length=6, seed=0)
    rollouts, rewards = result["rollouts"], result["rewards"]
    assert rewards.shape == (12, 6) and 0 < result["accuracy"] < 1
    for i, (text, finished) in enumerate(zip(rollouts.texts, rollouts.finished.tolist(), strict=True)):
        answer = common.last_boxed(text)
        assert rewards[i // 6, i % 6] == float(finished and answer == problems[i // 6].answer)
    assert result["accuracy"] == pytest.approx(float(rewards.mean()))
    assert result["response_length"] == pytest.approx(float(rollouts.lengths.float().mean()))
    assert result["truncated_share"] == pytest.approx(1 - float(rollouts.finished.float().mean()))
    assert 0 < result["truncated_share"]
    assert result["entropy"] == pytest.approx(float(rollouts.entropy.sum() / rollouts.lengths.sum()), rel=1e-5)


def test_evaluation_keeps_to_its_own_temperature(model_folder, data):
    """Held-out accuracy measured at the training temperature: a run at 0.5 beats one at 1 before either begins."""
    for temperature in (0.5, 1.0):
        settings = dict(temperature=temperature, eval_steps=2, output_dir=f"at{temperature}")
        grpo.main(arguments(grpo, model_folder, data, **settings))
    assert evaluations("at0.5")[0] == evaluations("at1.0")[0]
    grpo.main(arguments(grpo, model_folder, data, eval_steps=2, eval_temperature=0.5, output_dir="other"))
    assert evaluations("other")[0]["eval_entropy"] < evaluations("at1.0")[0]["eval_entropy"]


def test_evaluations_share_their_random_numbers(model_folder, data):
    """With fresh noise at every evaluation, a model that does not change goes up and down by several points."""
    grpo.main(arguments(grpo, model_folder, data, learning_rate=0.0, weight_decay=0.0, max_steps=3, eval_steps=1))
    first, *others = evaluations()
    for record in others:
        assert {**record, "step": 0, "kl_to_start": 0.0} == first
        assert abs(record["kl_to_start"]) < 1e-6
    assert len(others) == 3


def test_evaluation_changes_no_training(model_folder, data):
    """An evaluation that draws from the run's random stream, or leaves a mode behind, makes it another run."""
    for every in (0, 1):
        grpo.main(arguments(grpo, model_folder, data, max_steps=3, eval_steps=every, output_dir=f"every{every}"))
    trained = [common.load_model(f"every{every}", "cpu")[0].state_dict() for every in (0, 1)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_kl_is_measured_on_the_models_own_samples():
    """The two models swapped, padding counted, or the sampled log-ratio, which can be negative, in place of k3."""
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    rollouts = common.sample(model, TOKENIZER, [[7, 8, 9], [10]], 6, 8, 1.0, seed=0)
    assert abs(common.kl_between(model, model, rollouts, 10**6)) < 1e-9
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in range(12):
            start, end = (3 if row < 6 else 1), int(rollouts.attention_mask[row].sum())
            ids = rollouts.ids[row : row + 1, :end]
            logits = [m(ids).logits[0, start - 1 : end - 1].double() for m in (model, other)]
            p, q = (torch.log_softmax(z, -1).gather(1, ids[0, start:, None]) for z in logits)
            total, tokens = total + float(((q - p).exp() - (q - p) - 1).sum()), tokens + end - start
    for budget in (1, 10**6):
        assert common.kl_between(model, other, rollouts, budget) == pytest.approx(total / tokens, rel=1e-4)
