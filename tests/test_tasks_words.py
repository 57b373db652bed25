"""Word problems: sentences whose answers are right, splits and templates that share nothing, a teacher who can err."""

import operator
import random
import re
from fractions import Fraction

import pytest
from helpers import grade

import sft
import tasks
from plumbing.errors import UserError
from tasks import words

EXACT = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
BOTH = pytest.mark.parametrize("name", words.NAMES)


@BOTH
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(name, split):
    """A wrong gold answer teaches the mistake. Every number of the sentence is used, in order, and stays below 100."""
    for problem in words.problems(name, split, 300):
        assert [int(number) for number in re.findall("[0-9]+", problem.prompt)] == problem.numbers
        value = problem.numbers[0]
        for sign, number in zip(problem.signs, problem.numbers[1:], strict=True):
            value = EXACT[sign](Fraction(value), number)
            assert value.denominator == 1 and 1 <= value <= 99
        assert problem.answer == str(value)


@BOTH
def test_splits_share_nothing(name):
    train = {problem.prompt for seed in range(2) for problem in words.problems(name, "train", 500, seed)}
    test = {problem.prompt for seed in range(2) for problem in words.problems(name, "test", 200, seed)}
    assert len(train) > 900 and not train & test


def test_unseen_templates_are_unseen():
    """What carries over to other sentences is asked in other sentences."""
    seen, unseen = (words.TEMPLATES[name] for name in words.NAMES)
    assert not {sentence for sentence, _ in seen} & {sentence for sentence, _ in unseen}


def test_problems_depend_on_the_seed_only():
    assert words.problems("words", "train", 20) == words.problems("words", "train", 20)
    assert words.problems("words", "train", 20) != words.problems("words", "train", 20, seed=1)


def test_the_teacher_is_right_more_often_by_steps_than_by_guesses():
    """Otherwise there is no better behaviour to be amplified."""
    problems = tasks.load_problems("words", "train", 1500)
    texts = [words.teach(problem, random.Random(i)) for i, problem in enumerate(problems)]
    rewards = grade(texts, problems)
    guessed = [reward for text, reward in zip(texts, rewards) if text.startswith("\\boxed")]
    worked = [reward for text, reward in zip(texts, rewards) if not text.startswith("\\boxed")]
    assert abs(len(guessed) / len(texts) - words.GUESSES) < 0.05
    assert 0.2 < sum(guessed) / len(guessed) < 0.4
    assert 0.65 < sum(worked) / len(worked) < 0.85
    right = [text for text, reward in zip(texts, rewards) if reward == 1 and text not in guessed]
    assert any(re.fullmatch(r"(\d+ [-+*/] \d+ = \d+\n){3}\\boxed\{\d+\}", text) for text in right)


def test_behaviours_are_not_written_for_words():
    with pytest.raises(UserError, match="not for words"):
        sft.write(words.problems("words", "train", 1)[0], sft.Args(data="words", behaviours=["verification"]), None)
