"""Arithmetic: chains whose answers are right, splits that share nothing, and a teacher as imperfect as it says."""

import itertools
import random
import re
from collections import Counter

import pytest
from helpers import TOKENIZER

import tasks
from plumbing.errors import UserError
from tasks import arithmetic
from tasks.answers import last_boxed


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(split):
    """A wrong gold answer teaches the mistake. No intermediate result is negative."""
    problems = arithmetic.problems("arithmetic", split, 500)
    assert len(problems) == len({problem.prompt for problem in problems}) == 500
    for problem in problems:
        assert re.fullmatch(r"\d([+-]\d){4}=", problem.prompt)
        numbers = [int(number) for number in re.findall(r"[+-]?\d+", problem.prompt)]
        assert int(problem.answer) == sum(numbers)
        assert all(1 <= abs(number) <= 9 for number in numbers)
        assert all(0 <= sum(numbers[:i]) <= 45 for i in range(1, 6))


def test_more_problems_than_there_are_are_refused():
    """Drawing until a million different ones are found would never end."""
    with pytest.raises(UserError, match="arithmetic test: has 61,431 problems, not 1,000,000"):
        tasks.load_problems("arithmetic", "test", 10**6)


@pytest.mark.slow
def test_there_are_as_many_problems_as_it_says():
    count = Counter()
    for numbers in itertools.product(range(1, 10), repeat=5):
        for signs in itertools.product((1, -1), repeat=4):
            signed = [numbers[0]]
            for sign, number in zip(signs, numbers[1:]):
                signed.append(sign * number)
            if min(arithmetic.results_of(signed)) >= 0:
                text = f"{signed[0]}" + "".join(f"{number:+d}" for number in signed[1:])
                count["test" if arithmetic.is_held_out(text) else "train"] += 1
    assert count == arithmetic.AVAILABLE


def prompts(split, n, seeds):
    """The prompts of n problems for each of some seeds, a set."""
    found = set()
    for seed in range(seeds):
        found |= {problem.prompt for problem in arithmetic.problems("arithmetic", split, n, seed)}
    return found


def test_splits_are_disjoint():
    """A held-out problem seen in training measures memory; that must not depend on the seeds of the two splits."""
    train = prompts("train", 4000, seeds=2)
    test = prompts("test", 1000, seeds=3)
    assert len(train) > 7000 and len(test) > 2500
    assert not train & test


def test_problems_are_the_same_as_before():
    """Numbers measured on them stay valid only while a seed gives the same problems, in the same order."""
    first, second = tasks.load_problems("arithmetic", "train", 2)
    assert (first.prompt, first.answer, first.where) == ("2+5+6-9-4=", "0", "arithmetic train 0")
    assert (second.prompt, second.answer) == ("4+4+6+8-2=", "20")
    assert arithmetic.problems("arithmetic", "test", 50) == tasks.load_problems("arithmetic", "test", 50)


# ---------------------------------------------------------------------------------------------------------------------
# The teacher
# ---------------------------------------------------------------------------------------------------------------------


# left, number, result; of a check: result, inverse, undone; and the mark. A slip can lead below 0.
STEP = re.compile(r"(-?\d+)([+-]\d)=(-?\d+)(?:\?(-?\d+)([+-]\d)=(-?\d+))?([;~])")


def taught(n=3000):
    """(problem, steps as STEP finds them, what the box says) of n completions; nothing but steps stands before it."""
    generator = random.Random(0)
    found = []
    for problem in arithmetic.problems("arithmetic", "train", n):
        text = arithmetic.teach(problem, generator)
        assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text
        work = text[: text.index("\\boxed")]
        assert "".join(match.group() for match in STEP.finditer(work)) == work
        steps = [match.groups() for match in STEP.finditer(work)]
        found.append((problem, steps, int(last_boxed(text))))
    return found


def kept(steps):
    """How many steps are done and not dropped again."""
    return sum(mark == ";" for *_, mark in steps)


def test_the_teacher_gives_up_and_guesses_as_often_as_it_says():
    """The later, the better: without that, an answer after some work would be worth no more than one at once.

    3000 draws with a fixed seed; the bounds are more than four standard deviations wide.
    """
    reached = Counter()
    given_up = Counter()
    right = Counter()
    for problem, steps, answer in taught():
        numbers = arithmetic.numbers_of(problem.prompt)
        done = kept(steps)
        for i in range(min(done + 1, 4)):
            reached[i] += 1
        if done < 4:
            value = int(steps[-1][2]) if steps else numbers[0]
            given_up[done] += 1
            right[done] += answer == value + sum(numbers[done + 1 :])
    for i in range(4):
        n = reached[i]
        assert abs(given_up[i] / n - arithmetic.GIVES_UP[i]) < 4.5 * (0.25 / n) ** 0.5
        assert abs(right[i] / given_up[i] - arithmetic.RIGHT_GUESSES[i]) < 4.5 * (0.25 / given_up[i]) ** 0.5
    assert sorted(arithmetic.RIGHT_GUESSES) == list(arithmetic.RIGHT_GUESSES)


def test_the_teacher_forgets_to_borrow_more_often_than_not():
    """The one mistake that is likelier than the truth: a sharper policy makes it more often, and rewards unlearn it.

    Every other step slips as rarely as the teacher says, whatever its sign.
    """
    borrows = Counter()
    others = Counter()
    for _, steps, _ in taught():
        redone = False
        for left, number, result, *_, mark in steps:
            error = int(result) - int(left) - int(number)
            if redone:
                assert error == 0  # done again, it is done rightly
            elif int(number) < 0 and int(left) >= 10 and int(left) % 10 < -int(number):
                borrows[error] += 1
            else:
                others[error != 0] += 1
            redone = mark == "~"
    n = borrows.total()
    assert n > 500
    assert abs(borrows[10] / n - arithmetic.FORGETS_TO_BORROW) < 0.07
    assert borrows[10] > n / 2
    assert 0.08 < others[True] / others.total() < 0.12


def test_checks_of_the_teacher_are_true():
    """A check that always agrees teaches that checking is a ritual. Back (~) if and only if the check has failed."""
    checked = 0
    failed = 0
    total = 0
    for _, steps, _ in taught():
        redone = False
        for left, number, result, start, inverse, undone, mark in steps:
            if not redone:
                total += 1
                checked += start is not None
            if start is not None:
                assert (start, int(inverse)) == (result, -int(number))
                assert int(undone) == int(start) + int(inverse)
                assert (mark == "~") == (undone != left)
                failed += mark == "~"
            else:
                assert mark == ";"
            redone = mark == "~"
    assert abs(checked / total - arithmetic.CHECKS) < 0.03
    assert failed > 200


def test_the_work_goes_on_from_what_is_written():
    """Also from a mistake that nobody has noticed; and every step takes the next number of the problem."""
    for problem, steps, answer in taught(500):
        numbers = arithmetic.numbers_of(problem.prompt)
        value = numbers[0]
        done = 0
        for left, number, result, *_, mark in steps:
            assert (int(left), int(number)) == (value, numbers[done + 1])
            if mark == ";":
                value = int(result)
                done += 1
        if done == 4:
            assert answer == value


def test_equally_good_answers_have_different_lengths():
    """What OPO's baseline is about. Four steps without a check are the shortest right work, a check makes it longer."""
    lengths = set()
    for problem, steps, answer in taught(500):
        if kept(steps) == 4 and str(answer) == problem.answer:
            lengths.add(sum(len(left) + len(result) + (start is not None) * 6 for left, _, result, start, *_ in steps))
    assert max(lengths) > 2 * min(lengths)


def test_the_teacher_is_the_same_as_before():
    """Its words, drawn from the same seeds: numbers measured on the embedded model stay valid."""
    problem = tasks.Problem("7+9-8+5-4=", "9")
    texts = [arithmetic.teach(problem, random.Random(f"9-{i}")) for i in (17, 7, 14, 25)]
    assert texts == [
        "7+9=16;16-8=18?18+8=26~16-8=8;8+5=13;13-4=9?9+4=13;\\boxed{9}",
        "7+9=16;16-8=18;18+5=23;\\boxed{19}",
        "7+9=25;\\boxed{26}",
        "\\boxed{9}",
    ]
    guesses = [arithmetic.teach(problem, random.Random(i), guesses=1.0) for i in range(300)]
    assert {re.sub(r"\d+", "", text) for text in guesses} == {"\\boxed{}"}
    assert 30 < guesses.count("\\boxed{9}") < 90  # right 2 times in 10


def test_the_teacher_survives_its_own_slips():
    """Two slips in a row can lead below -9, where there is no error that leads back above 0."""
    for value in range(-40, 12):
        errors = {arithmetic.wrong_by(value, random.Random(seed)) for seed in range(60)}
        assert 0 not in errors and all(abs(error) <= 9 for error in errors)
        assert value < 0 or min(errors) >= -value
