"""The course: every solution applies to the code as it is, runs, and shows what its exercise says."""

import ast
import contextlib
import json
import multiprocessing
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from helpers import ROOT, command_line, read_jsonl

PAGE = (ROOT / "docs/course.md").read_text(encoding="utf-8")
SOLUTIONS = (ROOT / "docs/solutions.md").read_text(encoding="utf-8")
RUN = dict(num_prompts=6, num_generations=4, max_completion_length=10, learning_rate=1e-3)
RUN |= dict(max_steps=3, eval_steps=0, save_steps=0, output_dir="run")


def solutions():
    """'3a' -> diff: the diffs of an exercise in order, with a letter each where it has several."""
    found = {}
    for number, section in re.findall(r"^## Exercise (\d+)\n(.*?)(?=^## |\Z)", SOLUTIONS, re.M | re.S):
        diffs = re.findall(r"^```diff\n(.*?)^```", section, re.M | re.S)
        for letter, diff in zip("ab", diffs):
            found[number + letter * (len(diffs) > 1)] = diff
    return found


def tree(*names):
    """A copy of the code in the folder 'code', with some solutions applied, as a student does it."""
    code = Path("code")
    if not code.exists():
        code.mkdir()
        for path in ROOT.glob("*.py"):
            shutil.copy(path, code)
        for folder in ("plumbing", "tasks", "variants"):
            shutil.copytree(ROOT / folder, code / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(code / "grpo.py", code / "my_opo.py")
    for name in names:
        Path("change.diff").write_text(solutions()[name], encoding="utf-8")
        done = subprocess.run(["git", "apply", "../change.diff"], cwd=code, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr}"
    return code.resolve()


def in_tree(code, script, words, outcome):
    """In a fork of this process, which has loaded torch already: run a script of that copy, with its own modules."""
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        if file.parent in (ROOT, ROOT / "plumbing", ROOT / "tasks"):
            del sys.modules[name]
    sys.path.insert(0, str(code))
    sys.argv = [str(code / script), *words]
    with open(outcome, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            from plumbing import figures

            figures.draw_curves = lambda folder: None
            runpy.run_path(sys.argv[0], run_name="__main__")
        except BaseException:
            traceback.print_exc(file=out)
            raise


def run(code, script, *words):
    """Run a script of a copy of the tree -> what it printed."""
    process = multiprocessing.get_context("fork").Process(target=in_tree, args=(code, script, words, "printed"))
    process.start()
    process.join(120)
    printed = Path("printed").read_text()
    assert process.exitcode == 0, printed[-2000:]
    return printed


@pytest.fixture
def train(model_folder, data):
    """train(code, script, name=value, ...): a short run -> (its steps, what it printed)."""

    def trained(code, script, **options):
        settings = RUN | dict(model=model_folder, data=data, eval_data=data) | options
        printed = run(code, script, *command_line(**settings))
        return [record for record in read_jsonl("run/metrics.jsonl") if "reward" in record], printed

    return trained


def answers():
    return read_jsonl("run/completions.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def test_ten_exercises_of_one_pattern():
    """A student who finds no expected output cannot tell whether it went well."""
    exercises = re.split(r"^## (?=\d+\. )", PAGE, flags=re.M)[1:]
    assert len(exercises) == 10
    for exercise in exercises:
        for part in ("**Predict.**", "**Expect", "**Why.**", "**Further.**", "```bash", "minute"):
            assert part in exercise, (exercise.splitlines()[0], part)


def test_every_exercise_with_a_change_links_its_solution():
    linked = set(re.findall(r"solutions\.md#exercise-(\d+)", PAGE))
    assert linked == {re.match(r"\d+", name).group() for name in solutions()}
    for number in linked:
        assert f"## Exercise {number}\n" in SOLUTIONS


@pytest.mark.parametrize("name", solutions())
def test_a_solution_is_small_and_applies(name):
    """A page that no longer fits the code: the student's first ten minutes are spent on somebody else's mistake."""
    added = [line for line in solutions()[name].splitlines() if re.match(r"\+(?!\+\+ )", line)]
    assert len(added) <= (40 if name == "10" else 15)
    code = tree(name)
    for path in re.findall(r"^\+\+\+ b/(.*)$", solutions()[name], re.M):
        ast.parse((code / path).read_text())


# ---------------------------------------------------------------------------------------------------------------------
# What each exercise claims
# ---------------------------------------------------------------------------------------------------------------------


def test_1_advantages_by_hand_are_those_that_were_logged(train):
    code = tree("1")
    train(code, "grpo.py", max_steps=1)
    printed = run(code, "by_hand.py", "run")
    rows = [line.split(maxsplit=3) for line in printed.splitlines()]
    assert len(rows) == RUN["num_generations"]
    for reward, logged, by_hand, *_ in rows:
        assert reward in ("0", "1") and logged == by_hand


def test_2_the_loss_is_zero_where_advantages_are_whitened_over_the_batch(train):
    code = tree("2")
    steps, _ = train(code, "grpo.py", advantage="batch_whitened", overwrite=True)
    assert all(abs(step["loss"]) < 1e-5 and step["grad_norm"] > 0.01 for step in steps)
    steps, _ = train(code, "grpo.py", overwrite=True)
    assert any(abs(step["loss"]) > 1e-4 for step in steps)


def test_3_only_a_mask_that_sampler_and_trainer_share_is_noticed(train):
    steps, printed = train(tree("3a"), "grpo.py")
    assert "warning: log-prob gap" in printed and steps[0]["logp_gap_max"] > 1
    shutil.rmtree("code")
    steps, printed = train(tree("3b"), "grpo.py", overwrite=True)
    assert "log-prob gap" not in printed and steps[0]["logp_gap_max"] < 1e-4
    shutil.rmtree("code")
    before, _ = train(tree(), "grpo.py", overwrite=True)
    assert before[0]["reward"] == steps[0]["reward"] and before[0]["grad_norm"] != steps[0]["grad_norm"]


def test_5_one_baseline_is_of_another_prompt_and_one_of_the_answer_itself(train):
    """(a): the mean of the prompt before; (b): equal rewards get unequal advantages."""
    train(tree("5a"), "grpo.py", advantage="group_centred", max_steps=1)
    groups = {}
    for answer in answers():
        groups.setdefault(answer["problem"], []).append(answer)
    means = [statistics.mean(answer["reward"] for answer in group) for group in groups.values()]
    trained = 0
    for i, group in enumerate(groups.values()):
        for answer in group:
            if answer["advantage"] != 0:  # groups of equal rewards get none
                trained += 1
                assert answer["reward"] - answer["advantage"] == pytest.approx(means[i - 1], abs=1e-5)
    assert trained >= 4
    shutil.rmtree("code")
    train(tree("5b"), "grpo.py", advantage="group_centred", max_steps=1, overwrite=True)
    longest = {}
    for answer in answers():
        longest[answer["problem"]] = max(answer["length"], longest.get(answer["problem"], 0))
    trained = [answer for answer in answers() if answer["advantage"] != 0]
    assert trained
    for answer in trained:
        expected = answer["reward"] - answer["length"] / longest[answer["problem"]]
        assert answer["advantage"] == pytest.approx(expected, abs=1e-4)


GRADE = """
import json
from tasks.answers import last_boxed
print(json.dumps(last_boxed("2+16=18;\\\\boxed{18}\\\\boxed{21}")))
"""


def test_8_the_first_box_counts():
    code = tree("8a")
    (code / "look.py").write_text(GRADE)
    assert json.loads(run(code, "look.py")) == "18"
    assert "\\boxed{18}\\boxed{21}" in PAGE


TEACH = """
import random
from tasks import arithmetic
problem = arithmetic.problems("arithmetic", "train", 1)[0]
texts = [arithmetic.teach(problem, random.Random(i)) for i in range(400)]
worked = [text for text in texts if "=" in text]
print(sum(text.count("boxed") == 2 for text in worked) / len(worked))
print(sum(text.count("boxed") == 2 for text in texts if text not in worked))
"""


def test_8_the_teacher_adds_a_second_box_to_eight_of_ten():
    code = tree("8b")
    (code / "look.py").write_text(TEACH)
    share, guesses = map(float, run(code, "look.py").split())
    assert 0.7 < share < 0.9 and guesses == 0


def test_9_the_copy_is_opo(train):
    code = tree("9")
    mine, _ = train(code, "my_opo.py", advantage="group_centred")
    theirs, _ = train(code, "opo.py", overwrite=True)
    for ours, other in zip(mine, theirs, strict=True):
        assert ours["reward"] == other["reward"]
        assert ours["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_10_a_task_of_ones_own_is_imitated_and_trained(train, model_folder):
    code = tree("10")
    taught = dict(model=model_folder, data="largest", problems=64, max_steps=2, num_prompts=8, learning_rate=1e-3)
    run(code, "sft.py", *command_line(**taught, max_completion_length=30, eval_steps=0, output_dir="start"))
    settings = RUN | dict(model="start", data="largest", max_steps=1)
    run(code, "grpo.py", *command_line(**settings))
    for answer in answers():
        numbers = answer["problem"].removesuffix("=").split(",")
        largest = str(max(map(int, numbers)))
        assert len(numbers) == 3 and answer["reward"] == (answer["finished"] and answer["answer"] == largest)
