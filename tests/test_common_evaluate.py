"""Evaluation: the numbers by which a model is judged."""

import pytest

import common
import tasks
from plumbing.models import load_model
from tasks.answers import last_boxed


@pytest.fixture
def result(model_folder, data):
    """Six answers to each of twelve problems, some of them cut off."""
    model, tokenizer = load_model(str(model_folder), "cpu")
    problems = tasks.load_problems(str(data))
    return common.evaluate(model, tokenizer, problems, 6, 1.0, max_completion_length=6, seed=0)


def test_an_answer_is_right_if_it_ends_with_the_gold_answer(result, data):
    """An answer graded against its neighbour's problem, or one that was cut off and counts all the same."""
    problems = tasks.load_problems(str(data))
    finished = result["rollouts"].finished.tolist()
    for i, text in enumerate(result["rollouts"].texts):
        right = finished[i] and last_boxed(text) == problems[i // 6].answer
        assert result["rewards"][i // 6, i % 6] == float(right)


def test_accuracy_is_the_mean_over_all_answers(result):
    """A mean over problems solved at least once, or over finished answers only, is another, better-looking number."""
    rollouts = result["rollouts"]
    assert result["rewards"].shape == (12, 6) and 0 < result["accuracy"] < 1
    assert result["accuracy"] == pytest.approx(float(result["rewards"].mean()))
    assert result["response_length"] == pytest.approx(float(rollouts.lengths.float().mean()))
    assert result["truncated_share"] == pytest.approx(1 - float(rollouts.finished.float().mean()))
    assert result["truncated_share"] > 0
    assert result["entropy"] == pytest.approx(float(rollouts.entropy.sum() / rollouts.lengths.sum()), rel=1e-5)
