"""Priming: solvers that show what they are asked to show, checks that tell the truth, controls, and options."""

import random
import re

import pytest
from conftest import TOKENIZER, arguments, read_jsonl, write_jsonl

import common
import sft
from analyze_trajectory import count_behaviours

BUILT_IN = pytest.mark.parametrize("data", ["arithmetic", "countdown-small", "countdown"])
SETS = [[name] for name in sft.BEHAVIOURS] + [["verification", "backtracking"], list(sft.BEHAVIOURS)]


def written(data, n=150, **options):
    """Scripted completions of n problems -> (texts, problems)."""
    problems, args = sft.load_trajectories(data, limit=n), sft.Args(data=data, **options)
    return [sft.write(p, args, random.Random(i)) for i, p in enumerate(problems)], problems


@BUILT_IN
@pytest.mark.parametrize("behaviours", SETS, ids=lambda names: "+".join(name[:6] for name in names))
def test_solvers_show_what_they_are_asked_for_and_are_right(data, behaviours):
    """A condition that shows another's behaviour compares nothing. Steps are unavoidable in a chain, and behind a step
    back from a Countdown target: they count as subgoals, where they go forwards."""
    texts, problems = written(data, behaviours=behaviours)
    assert common.grade(texts, problems) == [1.0] * len(texts)
    shown = {name: sum(count_behaviours(text)[name] > 0 for text in texts) / len(texts) for name in sft.BEHAVIOURS}
    for name in behaviours:
        assert shown[name] > 0.4, shown
    allowed = (
        {*behaviours, "subgoal_setting"} if data == "arithmetic" or "backward_chaining" in behaviours else behaviours
    )
    assert not any(share for name, share in shown.items() if name not in allowed), shown


def value(expression):
    """Of an expression of integers and + - * /, for a test: Python's own."""
    assert re.fullmatch(r"[-+*/()0-9]+", expression)
    return eval(expression.replace("/", "//"))  # noqa: S307


@BUILT_IN
@pytest.mark.parametrize("backward", [False, True])
def test_steps_and_checks_tell_the_truth(data, backward):
    """A check that always agrees teaches that checking is a ritual. Back (~) if and only if the check has failed."""
    behaviours = ["verification", "backtracking", "backward_chaining" if backward else "subgoal_setting"]
    failed = 0
    for text, problem in zip(*written(data, behaviours=behaviours)):
        thinking = re.split(r"</think>|\\boxed", text.removeprefix("<think>"))[0]
        pieces = re.findall(r"([^;~]+)([;~])", thinking)
        assert "".join(piece + mark for piece, mark in pieces) == thinking
        for piece, mark in pieces:
            step, _, check = piece.partition("?")
            left, result = step.removeprefix("<").split("=")
            if not check:
                assert mark == ";" and value(left) == int(result)
                continue
            checked, expected = check.split("=")
            if data == "arithmetic":  # ?22-15=7 after 7+15=22: undone, and rightly; is it what the step began with?
                first = re.match(r"-?\d+", left).group()
                assert value(checked) == int(expected)
                assert (mark == "~") == (int(expected) != int(first)) == (value(left) != int(result))
            else:  # ?37=24: is the result what is needed?
                assert value(left) == int(result) == int(checked)
                assert (mark == "~") == (int(checked) != int(expected))
                assert backward or int(expected) == problem.target
            failed += mark == "~"
    assert failed > 30


@BUILT_IN
def test_controls(data):
    """Wrong answers with all behaviours; right answers without any, with nothing or with dots in their place."""
    full, _ = written(data, behaviours=list(sft.BEHAVIOURS))
    wrong, problems = written(data, wrong_answers_only=True)
    assert max(common.grade(wrong, problems)) < 1.0
    assert all(sum(count_behaviours(text)[name] > 0 for text in wrong) > 20 for name in sft.BEHAVIOURS)
    checked, _ = written(data, behaviours=["verification"], wrong_answers_only=True)
    assert not any(count_behaviours(text)["backtracking"] for text in checked)  # the wrong answer is kept, not dropped
    empty, filler = written(data, empty=True)[0], written(data, filler=True)[0]
    assert common.grade(empty, problems) == common.grade(filler, problems) == [1.0] * len(empty)
    for text in empty + filler:
        assert not any(count_behaviours(text).values())
    assert [len(text) for text in filler] == [len(text) for text in full]
    ends = [re.split(r"</think>|(?=\\boxed)", text)[-1] for text in full]
    assert [text.split("</think>")[-1] for text in empty] == ends
    assert all(set(text.removesuffix(end)) <= set("<think>/.") for text, end in zip(filler, ends))


@pytest.mark.parametrize("data", ["arithmetic", "countdown-small"])
def test_trajectories_fit_the_embedded_model(data):
    """An unknown token, or a trajectory longer than what is sampled later, could never be rewarded."""
    for options in (dict(behaviours=list(sft.BEHAVIOURS)), dict(wrong_answers_only=True)):
        for text in written(data, 500, **options)[0]:
            ids = TOKENIZER(text)["input_ids"]
            assert TOKENIZER.unk_token_id not in ids and len(ids) < 128


def test_tags_where_the_prompt_asks_for_them():
    texts, _ = written("countdown", behaviours=["verification"])
    assert all(re.fullmatch(r"<think>[-+*/()0-9=?;]+</think>\n<answer>[-+*/()0-9]+</answer>", text) for text in texts)


def test_the_teacher_of_the_embedded_model_is_the_same_as_before():
    """Its words, drawn from the same seeds: numbers measured on the embedded model stay valid."""
    [problem] = sft.load_trajectories("arithmetic", limit=1)
    problem.prompt = "7+15-3+8="
    texts = [sft.write(problem, sft.Args(), random.Random(f"9-{i}")) for i in (0, 3, 4, 5)]
    slip = "7+15=22;22-3=19;19+8=30;\\boxed{30}"
    assert texts == ["7+15=22;22-3=19;19+8=27;\\boxed{27}", "\\boxed{36}", "\\boxed{30}", slip]
    texts = [sft.write(problem, sft.Args(direct=True), random.Random(i)) for i in range(300)]
    assert {re.sub(r"\d+", "", text) for text in texts} == {"\\boxed{}"}
    assert 60 < texts.count("\\boxed{27}") < 120  # right 3 times in 10


def test_the_teacher_survives_its_own_slips():
    """Two slips in a row can lead below -9, where there is no error that leads back above 0."""
    for value in range(-40, 12):
        errors = {sft.wrong_by(value, random.Random(seed)) for seed in range(60)}
        assert 0 not in errors and all(abs(error) <= 9 for error in errors)
        assert value < 0 or min(errors) >= -value


def test_the_teacher_of_countdown_answers_at_once():
    texts, problems = written("countdown-small", 300)
    rewards = common.grade(texts, problems)
    assert set(rewards) == {0.1, 1.0} and 60 < rewards.count(1.0) < 120
    assert not any(any(count_behaviours(text).values()) for text in texts)


@pytest.mark.parametrize("data", ["arithmetic", "countdown-small"])
def test_a_direct_base_learns_single_steps_beside_problems(data):
    """About half and half, so that it can calculate what a chain of steps is made of."""
    trajectories = sft.load_trajectories(data, direct=True)
    singles = [t for t in trajectories if t.response]
    assert 0.3 < len(singles) / len(trajectories) < 0.6
    for t in singles:
        step, answer = re.fullmatch(r"(.+);\\boxed\{(\d+)\}", t.response).groups()
        assert step == t.prompt + answer and value(t.prompt.rstrip("=")) == int(answer) <= 99


def test_trajectories_per_problem():
    """The same n at every visit, and different ones for different problems; without it, a new one at every visit."""
    problems = sft.load_trajectories("arithmetic", limit=2)
    for p in problems:
        p.ids = TOKENIZER(p.prompt)["input_ids"]

    def texts(n, visits=60):
        args = sft.Args(behaviours=list(sft.BEHAVIOURS), trajectories_per_problem=n)
        batches = [sft.collate(TOKENIZER, problems, seed, "cpu", args) for seed in range(visits)]
        return [{TOKENIZER.decode(b.ids[row, b.mask[row].bool()].tolist()) for b in batches} for row in (0, 1)]

    for n in (1, 2, 4):  # two of them can be equal by chance
        assert all(n // 2 < len(found) <= n for found in texts(n))
        assert texts(n) == texts(n)
    assert min(len(found) for found in texts(0)) > 10


def test_priming_trains(model_folder, data):
    """Through the command line's own parser, on a folder, and the notation is what it learns from."""
    options = ["--model", str(model_folder), "--behaviours", "verification", "backtracking", "--output_dir", "primed"]
    args = common.parse(sft.Args, sft.EMBEDDED, [*options, "--max_steps", "4", "--problems", "64", "--filler"])
    assert args.behaviours == ["verification", "backtracking"] and args.filler and args.problems == 64
    sft.main(args)
    losses = [row["loss"] for row in read_jsonl("primed/metrics.jsonl")]
    assert len(losses) == 4 and losses[-1] < losses[0]
    sft.main(arguments(sft, model_folder, "countdown-small", output_dir="countdown", empty=True))


# ---------------------------------------------------------------------------------------------------------------------
# What can go wrong
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ("--behaviours verify", "--behaviours verify"),
        ("--behaviours", "--behaviours"),
        ("--empty --filler", "--empty, --filler"),
        ("--trajectories_per_problem -1", "--trajectories_per_problem"),
        ("--problems -1", "--problems"),
        ("--behaviours verification", "--output_dir runs/tiny"),  # would be taken for the embedded model from then on
        ("--data countdown-small", "--output_dir runs/tiny"),
        ("--direct", "--output_dir runs/tiny"),
        ("--model FOLDER --data rows.jsonl --behaviours verification --output_dir x", "--behaviours: is for built-in"),
        ("--model FOLDER --data rows.jsonl --problems 3 --output_dir x", "--problems: is for built-in"),
        ("--data rows.jsonl --output_dir x", "rows.jsonl: is for a trained model"),
    ],
)
def test_a_bad_command_is_told_in_one_line(model_folder, tmp_path, options, words):
    write_jsonl(tmp_path / "rows.jsonl", [dict(prompt="1+1=", response="2")])
    with pytest.raises(common.UserError, match=words):
        options = options.replace("FOLDER", str(model_folder)).split()
        sft.main(common.parse(sft.Args, sft.EMBEDDED, options))
