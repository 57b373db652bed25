"""Countdown: problems that can be solved, splits that share nothing, and a verdict that no answer can hang or fool."""

import json
import random
import re
import time
from pathlib import Path

import pytest
from helpers import arguments, grade, read_jsonl, write_jsonl

import analyze_trajectory
import evaluate
import grpo
import tasks
from plumbing import verifier
from tasks.countdown import CountdownProblem, problems

SIZES = pytest.mark.parametrize("name", ["countdown", "countdown-small"])

# What the tests below judge answers to, unless they say otherwise.
PROBLEM = CountdownProblem("3 5 8=37", "(8*5)-3", numbers=[3, 5, 8], target=37)


def verdict(answer, numbers, target):
    return CountdownProblem("", "", numbers=numbers, target=target).verdict(f"<answer>{answer}</answer>")


@SIZES
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_target_can_be_reached(name, split):
    """A problem without solution teaches that nothing helps."""
    found = problems(name, split, 300)
    assert len(found) == len({problem.prompt for problem in found}) == 300
    for problem in found:
        numbers = problem.numbers
        spelt = " ".join(str(number) for number in numbers)
        assert problem.verdict(f"\\boxed{{{problem.answer}}}") == "right"
        if name == "countdown-small":
            assert len(numbers) == 3 and all(1 <= number <= 9 for number in numbers) and 1 <= problem.target <= 50
            assert problem.prompt == f"{spelt}={problem.target}" and "/" not in problem.answer
        else:
            assert len(numbers) in (3, 4) and all(1 <= number <= 99 for number in numbers)
            assert 10 <= problem.target <= 100
            assert f"Make {problem.target} of the numbers {spelt}," in problem.prompt
            assert all(tag in problem.prompt for tag in ("<think>", "</think>", "<answer>", "</answer>"))


def asked(name, split, n):
    """What problems of two seeds ask for, whatever the order of their numbers: a set."""
    found = problems(name, split, n, seed=0) + problems(name, split, n, seed=1)
    return {(tuple(sorted(problem.numbers)), problem.target) for problem in found}


@SIZES
def test_splits_share_nothing(name):
    """Neither another seed nor another order of the same numbers may bring a held-out problem into training."""
    train = asked(name, "train", 1500)
    test = asked(name, "test", 150)
    assert len(train) > 1000 and len(test) > 100 and not train & test


@SIZES
def test_problems_depend_on_the_seed_only(name):
    assert problems(name, "train", 20) == problems(name, "train", 20) != problems(name, "train", 20, seed=1)
    assert problems(name, "test", 20) == tasks.load_problems(name, "test", 20, "a system prompt")


def test_problems_are_the_same_as_before():
    """Numbers measured on them stay valid only while a seed gives the same problems, in the same order."""
    first, second = tasks.load_problems("countdown-small", "train", 2)
    assert (first.prompt, first.answer, first.where) == ("6 2 1=7", "2+(6-1)", "countdown train 0")
    assert (second.prompt, second.answer) == ("4 9 3=21", "9+(4*3)")
    [large] = tasks.load_problems("countdown", "test", 1)
    assert (large.numbers, large.target, large.answer) == ([38, 41, 7], 86, "(7+38)+41")


def test_the_search_ends_where_there_are_no_more():
    assert 300 < len(problems("countdown-small", "test", 2000)) < 2000


# ---------------------------------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("(8 * 5) - 3", "right"),
        ("8*5-3", "right"),
        ("  8*5-3", "right"),
        ("5*8-3", "right"),
        ("8*5-4", "well-formed"),  # another number
        ("8*5-3+3-3", "well-formed"),  # a number twice
        ("8*5", "well-formed"),  # a number left out
        ("37", "well-formed"),  # the target itself
        ("8+5-3", "well-formed"),  # another value
        # TinyZero pays for these, and what an unprimed model writes first is more often an equation than an expression.
        ("8*5-3 = 37", "well-formed"),
        ("8 x 5 - 3", "well-formed"),
        ("8 × 5 − 3", "well-formed"),
        ("8*5-3.0", "well-formed"),
        ("(8*5-3", "well-formed"),
        ("8 5 3", "well-formed"),
        ("8/(5-5)", "well-formed"),
        ("3/(8-8)", "well-formed"),
        ("8*5--3", "well-formed"),  # 43
        # A sign before a number, a full stop behind one, and any blanks change no value.
        ("-3+8*5", "right"),
        ("8*5+(-3)", "right"),
        ("+8*5-3", "right"),
        ("8*5-3.", "right"),
        ("8*5\t-\n3", "right"),
        ("", "wrong"),
        ("the answer", "wrong"),
        ("()", "wrong"),
        ("8*5-3 apples", "wrong"),
    ],
)
@pytest.mark.parametrize(
    "form", ["<answer>{}</answer>", "<think>\\boxed{{1}}</think><answer> {} </answer>.", "\\boxed{{{}}}"]
)
def test_verdicts(answer, expected, form):
    """A well-formed wrong answer earns a tenth: a first step for a model that solves nothing yet."""
    assert PROBLEM.verdict(form.format(answer)) == expected


def test_division_is_exact():
    """Floats would hold 1/3*3 unequal to 1, or 2/3+1/3 equal to something near 1."""
    assert verdict("8/(3-8/3)", [3, 3, 8, 8], 24) == "right"
    assert verdict("1/3+2", [1, 2, 3], 2) == "well-formed"


def test_no_number_is_made_of_two():
    """'1.5' is one number made of two, 0x10 is sixteen, and neither uses what was given, whatever its value."""
    assert verdict("1.5*4", [1, 5, 4], 6) == "well-formed"
    assert verdict("15-4", [1, 5, 4], 11) == "well-formed"
    assert verdict("0x10+1", [0, 10, 1], 17) == "well-formed"
    assert verdict("2**3", [2, 3], 8) == "well-formed"
    assert verdict("7//2", [7, 2], 3) == "well-formed"


RIGHT = "<answer>8*5-3</answer>"
WRONG = "<answer>8+5+3</answer>"


def test_the_last_answer_counts():
    assert PROBLEM.verdict(WRONG + RIGHT) == "right"
    assert PROBLEM.verdict(RIGHT + WRONG) == "well-formed"
    assert PROBLEM.verdict(RIGHT + "<answer>8+5") == "right"  # not closed: no answer
    assert PROBLEM.verdict("8*5-3</answer>") == "wrong"


def test_the_final_answer_is_what_is_judged():
    """Answers vote by their text: one that is judged by its tags must not vote by a box beside them."""
    assert PROBLEM.final_answer("\\boxed{1}" + RIGHT + "\\boxed{2}") == "8*5-3"
    assert PROBLEM.final_answer("8+5, so \\boxed{8*5-3}") == "8*5-3"
    assert PROBLEM.final_answer("8*5-3") == PROBLEM.final_answer("<answer></answer>") == ""
    assert PROBLEM.final_answer(f"<answer>{'1' * 2001}</answer>") == ""


HOSTILE = [
    "9**9**9**9",
    "9" * 5000,
    "9*" * 40 + "9",
    "9999999*9999999",
    "(" * 60 + "1" + ")" * 60,
    "(" * 10**5,
    "-" * 90 + "1",
    "1" + "+1" * 10**5,
    "٣*٥-٨",  # digits, but not of [0-9]
    "３+５+８",
    "8*5-3\0",
    "().__class__",
    "__import__('os').system('true')",
    "(lambda: 1)()",
    "[x for x in (1,)]",
    "1e9",
    "0x10",
    "1_000",
    "8 if 5 else 3",
    "8//5",
    "8%5",
    "8<<5",
    "8(5)",
    "*8",
    "()",
    "8*5-3 # 37",
    "8*5\\\n-3",
    "<answer>" * 10**5,
    "</answer>" * 10**5,
    "\\boxed{" * 10**5,
    "\ud800",
    "007",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_hostile_answers_earn_next_to_nothing_at_once(answer):
    """A power tower would hang the run, deep nesting end it, and a name or call would be the model's own program."""
    start = time.process_time()
    for text in (answer, f"<answer>{answer}</answer>", f"\\boxed{{{answer}}}"):
        assert PROBLEM.verdict(text) in ("wrong", "well-formed")
    assert time.process_time() - start < 1


def test_random_answers_neither_raise_nor_hang():
    """What a model writes early in training: anything over the characters of an expression, and some others."""
    generator = random.Random(0)
    verdicts = set()
    for _ in range(5000):
        text = "".join(generator.choices("0123456789+-*/() **//.e_x\0٣", k=generator.randint(0, 30)))
        verdicts.add(PROBLEM.verdict(f"<answer>{text}</answer>"))
    assert {"wrong", "well-formed"} <= verdicts <= {"wrong", "well-formed", "right"}


# ---------------------------------------------------------------------------------------------------------------------
# Rewards and logs
# ---------------------------------------------------------------------------------------------------------------------


def test_grading_asks_the_problem():
    """Countdown and mathematics side by side, and an unfinished answer scores 0 in both."""
    texts = ["\\boxed{8*5-3}", "\\boxed{37}", "\\boxed{1/2}", "\\boxed{8*5-3}"]
    asked = [PROBLEM, PROBLEM, tasks.Problem("", "0.5"), PROBLEM]
    assert grade(texts, asked, [True, True, True, False]) == [1.0, 0.1, 1.0, 0.0]


def test_no_verifier_is_needed(monkeypatch):
    """Its processes take seconds to start, and would compare values, which says nothing about the numbers used."""
    monkeypatch.setattr(verifier.SHARED, "start", None)
    assert grade(["\\boxed{37}"], [PROBLEM]) == [0.1]


def test_an_answer_can_be_judged_again_from_the_log(model_folder):
    """What its verdict needs goes with it into completions.jsonl: the target in a box is no solution, although its
    value is right."""
    grpo.main(arguments(grpo, model_folder, "countdown-small", eval_data="", eval_steps=1, max_steps=1))
    for row in read_jsonl("run/completions.jsonl"):
        assert re.fullmatch(r"\d \d \d=\d+", row["problem"])
        problem = tasks.problem_from_record(row)
        assert problem.prompt == row["problem"] and problem.answer == row["gold"]
        assert grade([row["text"]], [problem], [row["finished"]]) == [pytest.approx(row["reward"])]
        assert problem.verdict(f"\\boxed{{{problem.target}}}") == "well-formed"
        assert problem.verdict(f"\\boxed{{{row['gold']}}}") == "right"
    assert read_jsonl("run/metrics.jsonl")[0]["eval_accuracy"] < 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Through the scripts
# ---------------------------------------------------------------------------------------------------------------------


def test_samples_can_be_judged_again(model_folder):
    """What its verdict needs goes with an answer into the samples of evaluate.py, too."""
    options = "--data countdown-small --num_problems 3 --num_samples 2 --max_completion_length 10"
    evaluate.main(evaluate.parse([str(model_folder), *options.split()]))
    [path] = Path("runs/evaluation/samples").glob("*.jsonl")
    problems = tasks.load_problems("countdown-small", "test", 3)
    for record, problem in zip(read_jsonl(path)[1:], problems, strict=True):
        assert tasks.problem_from_record(record, problem.where) == problem


def measured(texts):
    """What evaluate.py measures of three answers to one problem."""
    record = dict(prompt="1 2 4=7", gold="(1+2)+4", numbers=[1, 2, 4], target=7, texts=texts, finished=[True] * 3)
    record |= dict(token_ids=[[1]] * 3, entropy=[0.0] * 3, kl=None)
    return evaluate.measure([record], [3], behaviours=True).values


def test_answers_between_tags_vote_and_show_their_behaviours():
    """R1-Zero style answers have no box: without a vote of theirs, maj@k is 0 however good the model."""
    texts = ["<think>1+2=3?3-2=1~</think><answer>(1+2)+4</answer>", "<answer>4+2+1</answer>", "<answer>1+2</answer>"]
    values = measured(texts)
    assert values["maj@3"] == [1.0] and values["avg@3"] == [pytest.approx(2 / 3)]
    assert values["verification"] == values["backtracking"] == [pytest.approx(1 / 3)]
    assert values["backward_chaining"] == [0.0]


def test_what_is_graded_is_what_votes():
    echo = "I put it in <answer> tags. <answer>4+2+1</answer>, so 8: \\boxed{8}"
    wrong = "<answer>1+2</answer>"
    assert measured([echo, wrong, wrong])["maj@3"] == [0.0]  # well-formed is not right
    assert measured([echo, echo, wrong])["maj@3"] == [1.0]


def test_pruning_scores_answers_from_a_file(model_folder, tmp_path):
    """A recorded answer keeps its numbers: the target in a box is no solution, although its value is right."""
    row = dict(problem="1 2 4=7", gold="(1+2)+4", numbers=[1, 2, 4], target=7)
    texts = ["1+2=3;\\boxed{3+4}", "1+2=3;\\boxed{7}", "1+2=3;\\boxed{1+2+4}"]
    path = write_jsonl(tmp_path / "rows.jsonl", [dict(**row, text=text) for text in texts])
    analyze_trajectory.main(analyze_trajectory.parse(["prune", str(model_folder), "--completions", str(path)]))
    assert json.loads(Path("runs/trajectory/prune.json").read_text())["own_accuracy"] == pytest.approx(1 / 3)


def test_a_record_without_its_target_has_no_right_answer():
    """A row of somebody's own file that lacks one field must not end a whole command in a traceback."""
    problem = tasks.problem_from_record(dict(problem="1 2 4=7", gold="1+2+4", numbers=[1, 2, 4]))
    assert problem.verdict("\\boxed{1+2+4}") == "well-formed"


@pytest.mark.parametrize("numbers", [5, "1 2", [1, "a"], [1.5], [None], [], None])
def test_numbers_that_are_none_make_no_countdown_problem(numbers):
    """A damaged row ended a whole command in a TypeError, in the middle of its grading."""
    problem = tasks.problem_from_record(dict(problem="1 2 4=7", gold="7", numbers=numbers, target=7))
    assert type(problem) is tasks.Problem
