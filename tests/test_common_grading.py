"""Grading: only the last complete box of a finished answer counts, and none can hang, crash or fool the verifier."""

import threading
import time

import pytest
from helpers import arguments, grade, read_jsonl

import common
import grpo
from plumbing import verifier
from plumbing.errors import UserError
from tasks import Problem


def score(gold, text, finished=True):
    return grade([text], [Problem("?", gold)], [finished])[0]


@pytest.mark.parametrize(
    "gold, text",
    [
        ("3", r"\boxed{3}"),
        ("3", r"2+1=3, so \boxed{3.0}"),
        (r"\dfrac{9}{7}", r"\boxed{9/7}"),  # bare LaTeX golds parse to nothing unless they are boxed first
        (r"\dfrac{9}{7}", r"\boxed{\frac{18}{14}}"),
        (r"1 - \sqrt{2}", r"\boxed{-\sqrt{2}+1}"),
        ("10{,}000", r"\boxed{10000}"),
        ("10000", r"\boxed{10{,}000}"),
        ("10,000", r"\boxed{10000}"),
        (r"\text{Yes}", r"\boxed{\text{Yes}}"),
        (r"\text{Yes}", r"\boxed{Yes}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\pi/2)}"),
        ("p - q", r"\boxed{p-q}"),
        ("0.0005", r"\boxed{0.05\%}"),
        ("3", r"wrong at first \boxed{4}, now right \boxed{3}"),
    ],
)
def test_right_answers_score_one(gold, text):
    """Problems whose answers can never be matched look like hard problems: they are noise that nobody notices."""
    assert score(gold, text) == 1.0


@pytest.mark.parametrize(
    "gold, text",
    [
        ("3", r"\boxed{4}"),
        ("3", "the answer is 3"),  # outside the box
        ("3", r"3 \boxed{4}"),
        ("3", r"\boxed{3} or \boxed{4}"),  # two boxes: the last one counts, and no set of both
        ("3", r"\boxed{3"),
        ("3", r"\boxed{}"),
        ("3", ""),
        (r"1 - \sqrt{2}", r"\boxed{1}"),  # a gold parsed carelessly is its first number
        (r"\text{Yes}", r"\boxed{No}"),
        ("even", r"\boxed{odd}"),
        ("12", r"\boxed{1, 2}"),
        ("", r"\boxed{}"),  # a problem without label: nothing is right
        ("", r"\boxed{3}"),
    ],
)
def test_wrong_answers_score_zero(gold, text):
    """Reward for anything but the answer is what the policy learns next: mention every number, box every guess."""
    assert score(gold, text) == 0.0


def test_the_gold_answer_comes_first():
    """math-verify lets an answer state an inequality's solutions as an interval, and not the other way round."""
    assert score("1<x<2", r"\boxed{(1,2)}") == 1.0
    assert score("(1,2)", r"\boxed{1<x<2}") == 0.0


@pytest.mark.parametrize("gold, text", [("2^{-99}", r"\boxed{2^{-98}}"), ("1/2004!", r"\boxed{1/2006!}")])
def test_tiny_numbers_are_not_all_equal(gold, text):
    """A comparison with an absolute tolerance holds all numbers near 0 equal: any tiny answer would be right."""
    assert score(gold, rf"\boxed{{{gold}}}") == 1.0
    assert score(gold, text) == 0.0


@pytest.mark.parametrize("gold", ["0", r"\frac{0}{0}", r"\infty", "x=0.0001", "(0.0001, 2)", "i/10000", ""])
@pytest.mark.parametrize("answer", ["0/0", r"1/0", r"-\infty", "0.0001i", "0.0001", r"10^{-4}\%", "x"])
def test_odd_numbers_do_not_stop_the_run(gold, answer):
    """nan, infinities, imaginary numbers and relations cannot be compared by size: TypeError in the middle of a run."""
    assert score(gold, rf"\boxed{{{answer}}}") in (0.0, 1.0)


def test_unfinished_answers_score_zero():
    """An answer that was cut off while it went on is not an answer, even if a box was seen on the way."""
    problems = [Problem("?", "3")] * 3
    assert grade([r"\boxed{3}"] * 3, problems, [True, False, True]) == [1.0, 0.0, 1.0]
    assert grade([r"\boxed{3}", "3"], problems[:2]) == [1.0, 0.0]  # unknown: taken for finished


def test_lists_of_unequal_length_are_a_bug():
    """zip stops silently at the shorter list: rewards go to the wrong answers."""
    with pytest.raises(ValueError):
        grade([r"\boxed{3}"] * 2, [Problem("?", "3")])


@pytest.mark.parametrize(
    "answer",
    ["{" * 50 + "}" * 50, r"\frac{1}{" * 200 + "1" + "}" * 200, "1" * 1990, "1" * 10**5, "\x00", "%", "\\", r"\frac"],
    ids=["braces", "fractions", "digits", "long", "zero_byte", "comment", "backslash", "bare_frac"],
)
def test_hostile_answers_score_zero(answer):
    """A model writes anything. What the verifier cannot digest scores 0 and takes no other answer with it."""
    start = time.perf_counter()
    texts = [r"\boxed{3}", f"\\boxed{{{answer}}}", r"\boxed{3}"]
    assert grade(texts, [Problem("?", "3")] * 3, grade_timeout=0.5) == [1.0, 0.0, 1.0]
    assert time.perf_counter() - start < 5


def test_an_answer_that_would_take_for_ever_is_given_up():
    """9^9^9^9 in a box asks the verifier for a number with more digits than there are atoms. A wall limit ends it."""
    start = time.perf_counter()
    tower = r"\boxed{9^{9^{9^{9}}}}"
    texts = [tower, r"\boxed{3}", tower, tower]
    assert grade(texts, [Problem("?", "3")] * 4, grade_timeout=0.5) == [0.0, 1.0, 0.0, 0.0]
    assert time.perf_counter() - start < 5  # one limit: the same answer is not tried again


def test_grading_works_in_a_thread():
    """math-verify's own time limit is a signal, which only the main thread may set: elsewhere it raises."""
    scores = []
    texts = [r"\boxed{\frac{22}{26}}", r"\boxed{12/13}"]
    problems = [Problem("?", r"\dfrac{11}{13}")] * 2
    thread = threading.Thread(target=lambda: scores.extend(grade(texts, problems)), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert scores == [1.0, 0.0]


def test_golds_that_cannot_be_read_are_counted():
    """A gold that math-verify reads nothing from makes its problem unsolvable, except by the very same text."""
    gold = Problem("?", "\\text{}")
    assert common.judge(["\\boxed{a}", "\\boxed{\\text{}}"], [gold] * 2, [True] * 2) == ["unparsable", "right"]


def test_a_run_whose_verifier_fails_stops(model_folder, data, monkeypatch, capsys):
    """Rewards of 0 for answers nobody could grade look like a model that cannot do the task: say so and stop."""
    real = verifier.compare

    def slow(pairs, timeout=3.0):
        return ["right" if verdict == "right" else "timeout" for verdict in real(pairs, timeout)]

    monkeypatch.setattr(verifier, "compare", slow)
    message = "step 1: no verdict .* of 8 answers: [0-9]+ timeout; .*--grade_timeout"
    with pytest.raises(UserError, match=message):
        grpo.main(arguments(grpo, model_folder, data, max_grader_errors=0.1))
    [record] = read_jsonl("run/metrics.jsonl")
    assert record["grader_timeouts"] > 0 and record["grader_errors"] == record["unparsable_golds"] == 0
    capsys.readouterr()
    grpo.main(arguments(grpo, model_folder, data, max_grader_errors=1.0, overwrite=True))
    assert capsys.readouterr().err.count("warning: verifier") == 2  # once when it happens, once at the end
