"""Countdown: problems that can be solved, splits that share nothing, and a score that no answer can hang or fool."""

import json
import random
import re
import time
from pathlib import Path

import pytest
from conftest import arguments, read_jsonl, write_jsonl

import common
import evaluate
import grpo
from common import countdown, score_countdown

VARIANTS = pytest.mark.parametrize("small", [False, True])


def task(problem):
    """What a problem asks for, whatever the order of its numbers."""
    return tuple(sorted(problem.numbers)), problem.target


@VARIANTS
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_target_can_be_reached(split, small):
    """A problem without solution teaches that nothing helps."""
    problems = countdown(split, 300, small=small)
    assert len(problems) == len({p.prompt for p in problems}) == 300
    for p in problems:
        numbers = p.numbers
        assert score_countdown(f"\\boxed{{{p.answer}}}", numbers, p.target) == 1.0
        if small:
            assert len(numbers) == 3 and all(1 <= number <= 9 for number in numbers) and 1 <= p.target <= 50
            assert p.prompt == f"{numbers[0]} {numbers[1]} {numbers[2]}={p.target}" and "/" not in p.answer
        else:
            assert len(numbers) in (3, 4) and all(1 <= number <= 99 for number in numbers) and 10 <= p.target <= 100
            assert f"Make {p.target} of the numbers {' '.join(map(str, numbers))}," in p.prompt
            assert all(tag in p.prompt for tag in ("<think>", "</think>", "<answer>", "</answer>"))


@VARIANTS
def test_splits_share_no_task(small):
    """Neither another seed nor another order of the same numbers may bring a held-out task into training."""
    train = {task(p) for seed in (0, 1) for p in countdown("train", 1500, seed, small)}
    test = {task(p) for seed in (0, 1) for p in countdown("test", 150, seed, small)}
    assert len(train) > 1000 and len(test) > 100 and not train & test


def test_problems_depend_on_the_seed_only():
    assert countdown("train", 20) == countdown("train", 20) != countdown("train", 20, seed=1)
    assert countdown("test", 20, small=True) == common.load_problems("countdown-small", "test", 20, "a system prompt")
    assert common.load_problems("countdown", "test", 5)[0].numbers
    assert 300 < len(common.countdown("test", 2000, small=True)) < 2000  # there are no more, and it stops looking


# ---------------------------------------------------------------------------------------------------------------------
# The score
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, reward",
    [
        ("(8 * 5) - 3", 1.0),
        ("8*5-3", 1.0),
        ("  8*5\n-3".replace("\n", ""), 1.0),
        ("5*8-3", 1.0),
        ("8*5-4", 0.1),  # another number
        ("8*5-3+3-3", 0.1),  # a number twice
        ("8*5", 0.1),  # a number left out
        ("37", 0.1),  # the target itself
        ("8+5-3", 0.1),  # another value
        ("8*5-3 = 37", 0.0),
        ("-3+8*5", 0.0),  # a sign is no operator between two numbers
        ("8*5-3.0", 0.0),
        ("8*5--3", 0.0),
        ("(8*5-3", 0.0),
        ("8 5 3", 0.0),
        ("8/(5-5)", 0.0),
        ("", 0.0),
        ("the answer", 0.0),
    ],
)
@pytest.mark.parametrize(
    "form", ["<answer>{}</answer>", "<think>\\boxed{{1}}</think><answer> {} </answer>.", "\\boxed{{{}}}"]
)
def test_a_well_formed_wrong_answer_earns_a_tenth(answer, reward, form):
    assert score_countdown(form.format(answer), [3, 5, 8], 37) == reward


def test_division_is_exact():
    """Floats would hold 1/3*3 unequal to 1, or 2/3+1/3 equal to something near 1."""
    assert score_countdown("<answer>8/(3-8/3)</answer>", [3, 3, 8, 8], 24) == 1.0
    assert score_countdown("<answer>1/3+2</answer>", [1, 2, 3], 2) == 0.1


def test_the_last_answer_counts():
    right, wrong = "<answer>8*5-3</answer>", "<answer>8+5+3</answer>"
    assert score_countdown(wrong + right, [3, 5, 8], 37) == 1.0
    assert score_countdown(right + wrong, [3, 5, 8], 37) == 0.1
    assert score_countdown(right + "<answer>8+5", [3, 5, 8], 37) == 1.0  # not closed: no answer
    assert score_countdown("8*5-3</answer>", [3, 5, 8], 37) == 0.0


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
        assert score_countdown(text, [3, 5, 8], 37) in (0.0, 0.1)
    assert time.process_time() - start < 1


def test_random_answers_neither_raise_nor_hang():
    """What a model writes early in training: anything over the characters of an expression, and some others."""
    generator, rewards = random.Random(0), set()
    for _ in range(5000):
        text = "".join(generator.choices("0123456789+-*/() **//.e_x\0٣", k=generator.randint(0, 30)))
        rewards.add(score_countdown(f"<answer>{text}</answer>", [3, 5, 8], 37))
    assert rewards <= {0.0, 0.1, 1.0} and {0.0, 0.1} <= rewards


# ---------------------------------------------------------------------------------------------------------------------
# Through the scripts
# ---------------------------------------------------------------------------------------------------------------------


def test_grading_dispatches_on_the_problem():
    """Countdown and mathematics side by side, and an unfinished answer scores 0 in both."""
    [problem] = countdown("test", 1, small=True)
    texts = [
        f"\\boxed{{{problem.answer}}}",
        f"\\boxed{{{problem.target}}}",
        "\\boxed{1/2}",
        f"\\boxed{{{problem.answer}}}",
    ]
    problems = [problem, problem, common.Problem("", "0.5"), problem]
    assert common.grade(texts, problems, [True, True, True, False]) == [1.0, 0.1, 1.0, 0.0]


def test_countdown_needs_no_verifier(monkeypatch):
    """Its processes take seconds to start, and would compare values, which says nothing about the numbers used."""
    monkeypatch.setattr(common, "verifier", lambda pairs: [1 / 0 for _ in pairs])
    [problem] = countdown("test", 1, small=True)
    assert common.grade([f"\\boxed{{{problem.target}}}"], [problem]) == [0.1]


def test_countdown_trains_and_is_evaluated(model_folder):
    """What is needed to score an answer again goes with it into completions.jsonl and the samples of evaluate.py."""
    settings = dict(eval_data="", eval_steps=1, max_steps=1)
    grpo.main(arguments(grpo, model_folder, "countdown-small", **settings))
    answers = read_jsonl("run/completions.jsonl")
    for answer in answers:
        assert re.fullmatch(r"\d \d \d=\d+", answer["problem"])
        expected = score_countdown(answer["text"], answer["numbers"], answer["target"])
        assert answer["reward"] == pytest.approx(expected if answer["finished"] else 0.0)
    assert read_jsonl("run/metrics.jsonl")[0]["eval_accuracy"] < 0.5
    options = [
        "--data",
        "countdown-small",
        "--num_problems",
        "3",
        "--num_samples",
        "2",
        "--max_completion_length",
        "10",
    ]
    evaluate.main(evaluate.parse(["run", *options]))
    [samples] = [read_jsonl(path) for path in Path("runs/evaluation/samples").glob("*.jsonl")]
    for record in samples[1:]:
        expected = [score_countdown(text, record["numbers"], record["target"]) for text in record["texts"]]
        assert evaluate.grade_record(record) == [r if done else 0.0 for r, done in zip(expected, record["finished"])]


def test_answers_between_tags_vote_and_show_their_behaviours():
    """R1-Zero style answers have no box: without a vote of theirs, maj@k is 0 however good the model."""
    texts = ["<think>1+2=3?3-2=1~</think><answer>(1+2)+4</answer>", "<answer>4+2+1</answer>", "<answer>1+2</answer>"]
    record = dict(prompt="", gold="(1+2)+4", numbers=[1, 2, 4], target=7, texts=texts, finished=[True] * 3)
    record |= dict(token_ids=[[1]] * 3, entropy=[0.0] * 3, kl=None)
    values, _ = evaluate.measure([record], [3], behaviours=True)
    assert values["maj@3"] == [1.0] and values["avg@3"] == [pytest.approx(2 / 3)]
    assert values["verification"] == values["backtracking"] == [pytest.approx(1 / 3)]
    assert values["backward_chaining"] == [0.0]
    echo = "I put it in <answer> tags. <answer>4+2+1</answer>, so 8: \\boxed{8}"  # what is graded is what votes
    record["texts"] = [echo, "<answer>1+2</answer>", "<answer>1+2</answer>"]
    assert evaluate.measure([record], [3])[0]["maj@3"] == [0.0]  # well-formed is not right
    record["texts"][1:] = [echo, "<answer>1+2</answer>"]
    assert evaluate.measure([record], [3])[0]["maj@3"] == [1.0]


def test_pruning_scores_countdown_from_a_file(model_folder, tmp_path):
    """A recorded answer keeps its numbers: the target in a box is no solution, although its value is right."""
    import analyze_trajectory

    row = dict(problem="1 2 4=7", text="1+2=3;\\boxed{3+4}", gold="(1+2)+4", numbers=[1, 2, 4], target=7)
    path = write_jsonl(
        tmp_path / "rows.jsonl", [row, row | dict(text="1+2=3;\\boxed{7}"), row | dict(text="1+2=3;\\boxed{1+2+4}")]
    )
    analyze_trajectory.main(analyze_trajectory.parse(["prune", str(model_folder), "--completions", str(path)]))
    assert json.loads(Path("runs/trajectory/prune.json").read_text())["own_accuracy"] == pytest.approx(1 / 3)
