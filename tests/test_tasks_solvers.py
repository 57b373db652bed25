"""Every task's solver shows what it is asked for, its checks tell the truth, and the controls show nothing."""

import random
import re

import pytest
from helpers import TOKENIZER, grade

import sft
import tasks
from tasks import countdown
from tasks.behaviours import BEHAVIOURS, NOTATION_WRITER, count_behaviours

EVERY_TASK = pytest.mark.parametrize("data", ["arithmetic", "countdown-small", "countdown"])
COUNTDOWN = pytest.mark.parametrize("data", ["countdown-small", "countdown"])
EMBEDDED_TASKS = pytest.mark.parametrize("data", ["arithmetic", "countdown-small"])
SETS = [[name] for name in BEHAVIOURS] + [["verification", "backtracking"], list(BEHAVIOURS)]


def written(data, n=150, **options):
    """Scripted completions of n problems -> (texts, problems)."""
    problems = tasks.load_problems(data, "train", n)
    args = sft.Args(data=data, **options)
    texts = [sft.write(problem, args, random.Random(i)) for i, problem in enumerate(problems)]
    return texts, problems


def shares(texts):
    """Of every behaviour, the share of texts that show it."""
    shown = {}
    for name in BEHAVIOURS:
        shown[name] = sum(count_behaviours(text)[name] > 0 for text in texts) / len(texts)
    return shown


@EVERY_TASK
@pytest.mark.parametrize("behaviours", SETS, ids=lambda names: "+".join(name[:6] for name in names))
def test_solvers_show_what_they_are_asked_for(data, behaviours):
    """A condition that shows another's behaviour compares nothing."""
    texts, problems = written(data, behaviours=behaviours)
    if data == "arithmetic":
        assert grade(texts, problems) == [1.0] * len(texts)
    for name, share in shares(texts).items():
        assert share == 0 or name in behaviours, name
        assert share > 0.4 or name not in behaviours, name


def value(expression):
    """Of an expression of integers and + - * /, for a test: Python's own."""
    assert re.fullmatch(r"[-+*/()0-9]+", expression)
    return eval(expression.replace("/", "//"))  # noqa: S307


def thinking_of(text):
    return re.split(r"</think>|\\boxed", text.removeprefix("<think>"))[0]


def assert_true_in_a_chain(step, check, mark):
    """'?22-15=7' after '7+15=22': undone, and rightly. Is it what the step began with?"""
    left, result = step.removeprefix("<").split("=")
    checked, expected = check.split("=")
    first = re.match(r"-?\d+", left).group()
    assert value(checked) == int(expected)
    assert (mark == "~") == (int(expected) != int(first)) == (value(left) != int(result))


def assert_true_in_countdown(step, check, mark, last):
    """'?37=24' after '(8*5)-3=40-3=37': is the result what is needed? Only the last attempt may be kept though it is
    not."""
    stages = step.removeprefix("<").split("=")
    checked, expected = check.split("=")
    assert {value(stage) for stage in stages} == {int(checked)}
    if mark == "~":
        assert checked != expected
    else:
        assert last


@EMBEDDED_TASKS
@pytest.mark.parametrize("backward", [False, True])
def test_steps_and_checks_tell_the_truth(data, backward):
    """A check that always agrees teaches that checking is a ritual. Whoever goes back (~) has checked and failed."""
    behaviours = ["verification", "backtracking", "backward_chaining" if backward else "subgoal_setting"]
    failed = 0
    for text, problem in zip(*written(data, behaviours=behaviours)):
        thinking = thinking_of(text)
        pieces = re.findall(r"([^;~]+)([;~])", thinking)
        assert "".join(piece + mark for piece, mark in pieces) == thinking
        for i, (piece, mark) in enumerate(pieces):
            step, _, check = piece.partition("?")
            if piece.startswith("@"):
                assert mark == ";"
            elif not check:
                left, result = step.removeprefix("<").split("=")
                assert mark == ";" and value(left) == int(result)
            elif data == "arithmetic":
                assert_true_in_a_chain(step, check, mark)
            else:
                assert_true_in_countdown(step, check, mark, last=i == len(pieces) - 1)
                assert backward or int(check.split("=")[1]) == problem.target
            failed += mark == "~"
    assert failed > 30


def test_english_tells_the_truth_too():
    """The same as above, in sentences: every calculation is right, and a dead end is one."""
    texts, _ = written("countdown", behaviours=list(BEHAVIOURS))
    for text in texts:
        sentences = thinking_of(text).split(". ")
        for sentence, following in zip(sentences, [*sentences[1:], ""]):
            equation = re.search(r"[-+*/()0-9]+( = [-+*/()0-9]+)+", sentence)
            if equation:
                assert len({value(stage) for stage in equation[0].split(" = ")}) == 1
            check = re.fullmatch(r"Let me check whether (-?\d+) is (-?\d+)\.?", sentence)
            if check and following == "That is a dead end":
                assert check[1] != check[2]
            elif check and following:
                pytest.fail(f"after a check that held, the search goes on: {text}")


def attempts_of(text):
    """The expressions that a text without other behaviours than backtracking has tried."""
    sentences = re.split(r"[~;]|\. ", thinking_of(text))
    return [re.split(" ?= ?", sentence)[0] for sentence in sentences if "=" in sentence]


@COUNTDOWN
def test_the_solver_does_not_know_the_solution(data):
    """A script that fails until it feels like it, and then writes the solution, is no search: it teaches that whatever
    comes behind enough failures is right. Here an attempt hits as often behind failures as at first."""
    first = []
    later = []
    for text, problem in zip(*written(data, 2000, behaviours=["backtracking"])):
        attempts = attempts_of(text)
        hits = [value(attempt) == problem.target for attempt in attempts]
        assert not any(hits[:-1]) and len(hits) <= countdown.MOST_ATTEMPTS  # it stops when it has found one
        first += hits[:1]
        later += hits[1:]
    chance = sum(first) / len(first)
    assert 0.03 < chance < 0.2
    assert sum(later) / len(later) == pytest.approx(chance, abs=0.03)


@COUNTDOWN
def test_a_search_is_given_up_as_often_as_it_says(data):
    """Of the attempts that failed, and were not the last that a search may have."""
    given_up = 0
    failed = 0
    for text, problem in zip(*written(data, 1000, behaviours=["backtracking"])):
        attempts = attempts_of(text)
        missed = [value(attempt) != problem.target for attempt in attempts]
        failed += sum(missed[: countdown.MOST_ATTEMPTS - 1])
        given_up += missed[-1] and len(attempts) < countdown.MOST_ATTEMPTS
    assert given_up / failed == pytest.approx(countdown.GIVES_UP, abs=0.025)


@COUNTDOWN
@pytest.mark.parametrize("others", [[], ["verification"], ["subgoal_setting"], ["backward_chaining"]])
def test_sets_of_behaviours_are_right_equally_often(data, others):
    """What is compared are behaviours. A set that is right more often would win by its answers."""
    texts, problems = written(data, 600, behaviours=["backtracking", *others])
    every, _ = written(data, 600, behaviours=list(BEHAVIOURS))
    assert grade(texts, problems) == grade(every, problems)
    assert grade(texts, problems).count(1.0) / 600 > 0.2


@pytest.mark.parametrize(
    "expression, stages",
    [
        ("(8*5)-3", "(8*5)-3=40-3=37"),
        ("2+(5*9)", "2+(5*9)=2+45=47"),
        ("(1+2)*(3+4)", "(1+2)*(3+4)=3*(3+4)=3*7=21"),
        ("((8*5)-3)*(8-5)", "((8*5)-3)*(8-5)=(40-3)*(8-5)=37*(8-5)=37*3=111"),
        ("(1+2)*(1+2)", "(1+2)*(1+2)=3*(1+2)=3*3=9"),
    ],
)
def test_an_attempt_is_worked_out_one_operation_at_a_time(expression, stages):
    """A base that has seen single operations only cannot do two in one go: 93% of such attempts were wrong after
    priming, and with them every check."""
    assert countdown.write_attempt(expression, 37, ["backtracking"], NOTATION_WRITER) == stages


def test_a_part_is_made_before_the_rest():
    """A subgoal is a target on the way. An intermediate result that nobody aimed at is none."""
    assert count_behaviours("8*5=40;40-3=37;")["subgoal_setting"] == 0
    assert count_behaviours("@8*5;8*5=40;40-3=37;")["subgoal_setting"] == 1
    for data in ("arithmetic", "countdown-small"):
        for text in written(data, behaviours=["subgoal_setting"])[0]:
            subgoal, first_step = re.match(r"@(.+?);(.+?)=", text).groups()
            assert subgoal.startswith(first_step)


@EVERY_TASK
def test_wrong_answers_with_all_behaviours(data):
    texts, problems = written(data, wrong_answers_only=True)
    assert max(grade(texts, problems)) < 1.0
    assert all(share * len(texts) > 20 for share in shares(texts).values())
    checked, _ = written(data, behaviours=["verification"], wrong_answers_only=True)
    assert shares(checked)["backtracking"] == 0  # the wrong answer is kept, not dropped


@EVERY_TASK
def test_the_same_answers_without_behaviours(data):
    """With nothing or with dots in place of the thinking, and the same answers, as often right and as often wrong."""
    full, problems = written(data, behaviours=list(BEHAVIOURS))
    empty, _ = written(data, empty=True)
    filler, _ = written(data, filler=True)
    assert grade(empty, problems) == grade(filler, problems) == grade(full, problems)
    assert not any(shares(empty + filler).values())
    assert [len(text) for text in filler] == [len(text) for text in full]
    ends = [re.split(r"</think>|(?=\\boxed)", text)[-1] for text in full]
    assert [text.split("</think>")[-1] for text in empty] == ends
    assert all(set(text.removesuffix(end)) <= set("<think>/.") for text, end in zip(filler, ends))


@EMBEDDED_TASKS
@pytest.mark.parametrize("options", [dict(behaviours=list(BEHAVIOURS)), dict(wrong_answers_only=True)])
def test_trajectories_fit_the_embedded_model(data, options):
    """An unknown token, or a trajectory longer than what is sampled later, could never be rewarded."""
    most = {"arithmetic": 160, "countdown-small": 256}[data]  # a search is longer than a chain
    for text in written(data, 500, **options)[0]:
        ids = TOKENIZER(text)["input_ids"]
        assert TOKENIZER.unk_token_id not in ids and len(ids) < most


def test_tags_where_the_prompt_asks_for_them():
    texts, _ = written("countdown", behaviours=["verification"])
    sentences = r"[-+*/()0-9]+( = [-+*/()0-9]+)* = \d+\. Let me check whether \d+ is \d+\."
    for text in texts:
        assert re.fullmatch(rf"<think>{sentences}</think>\n<answer>[-+*/()0-9]+</answer>", text)


def test_the_teacher_of_countdown_answers_at_once():
    texts, problems = written("countdown-small", 300)
    rewards = grade(texts, problems)
    assert set(rewards) == {0.1, 1.0} and 60 < rewards.count(1.0) < 120
    assert not any(shares(texts).values())


@EMBEDDED_TASKS
def test_exercises_are_right(data):
    """One operation after another, and the answer; with every number that a problem may hold, also the largest."""
    second_numbers = set()
    for prompt, response in tasks.built_in()[data].exercises():
        steps, answer = re.fullmatch(r"(.+);\\boxed\{(-?\d+)\}", response).groups()
        stages = steps.split("=")
        assert f"{stages[0]}=" == prompt and stages[-1] == answer
        assert {value(stage) for stage in stages} == {int(answer)}
        if len(stages) == 2:
            assert int(answer) <= 99
            second_numbers.add(int(re.search(r"(\d+)=", prompt).group(1)))
    assert second_numbers == set(range(1, 10))


@pytest.mark.parametrize("data, lowest, signs", [("arithmetic", 0, "+-"), ("countdown-small", -8, "+-*/")])
def test_exercises_hold_the_kinds_of_steps_that_a_solver_writes(data, lowest, signs):
    """Working backwards from a small target goes below 0, and divides. A base that has never seen such a step gets half
    of them wrong after priming, and what looks like a failed behaviour is failed arithmetic."""
    exercises = tasks.built_in()[data].exercises()
    answers = [int(re.search(r"boxed\{(-?\d+)", response).group(1)) for _, response in exercises]
    assert min(answers) == lowest
    assert {sign for sign in "+-*/" if any(sign in prompt for prompt, _ in exercises)} == set(signs)
    in_parentheses = sum("(" in prompt for prompt, _ in exercises)
    assert in_parentheses == (countdown.EXPRESSIONS if data == "countdown-small" else 0)


def test_exercises_solve_no_held_out_problem():
    """The same numbers with the same target are such a problem, whatever the order."""
    for prompt, _ in countdown.exercises():
        numbers = [int(number) for number in re.findall("[0-9]+", prompt)]
        if len(numbers) == 3:
            assert not countdown.is_held_out(numbers, value(prompt.rstrip("=")))


def test_working_backwards_begins_at_the_end_of_the_chain():
    """Written from the front, it is forward reasoning with another mark, and priming with it shows nothing."""
    problem = tasks.Problem("7+15-3+8=", "27")
    arithmetic = tasks.built_in()["arithmetic"]
    backwards = arithmetic.solve(problem, ["backward_chaining"], False, random.Random(0))
    assert backwards == ("<-3+8=5;<15+5=20;<7+20=27;", "27")
    forwards = arithmetic.solve(problem, ["subgoal_setting"], False, random.Random(0))
    assert forwards == ("@7+15;7+15=22;22-3=19;19+8=27;", "27")
