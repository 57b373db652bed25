"""docs/course.md, docs/solutions.md, docs/inside.ipynb: a diff applies, runs, and shows what its exercise claims; the
notebook's cells run.

Every diff is applied to a copy of the code by the very command that the page gives. What the copy then does is compared
with what the code as it is does, on the throw-away model: a step takes a fraction of a second.
"""

import ast
import contextlib
import importlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from helpers import ROOT, arguments, learned, read_jsonl

COURSE = (ROOT / "docs/course.md").read_text(encoding="utf-8")
SOLUTIONS = (ROOT / "docs/solutions.md").read_text(encoding="utf-8")
NOTEBOOK = ROOT / "docs/inside.ipynb"

DIFFS = dict(re.findall(r"^### (\w+)\n.*?^```diff\n(.*?)^```$", SOLUTIONS, re.MULTILINE | re.DOTALL))
PARTS = ("**Predict.**", "**Do", "**Expect", "**Look at**", "**Why.**", "**One question further.**")
MOST_LINES = 10  # that an exercise may ask for


def exercises(page):
    """Number -> text of every section '## 3. ...'."""
    pieces = re.split(r"^## (\d+)\. ", page, flags=re.MULTILINE)
    return {int(number): text for number, text in zip(pieces[1::2], pieces[2::2])}


def added(name):
    """The lines that a diff adds."""
    return [line[1:] for line in DIFFS[name].splitlines() if line.startswith("+") and not line.startswith("+++")]


# The pages ------------------------------------------------------------------------------------------------------------


def test_ten_exercises_have_all_their_parts():
    """An exercise without a prediction is a demonstration, and one without an explanation a riddle."""
    assert list(exercises(COURSE)) == list(range(1, 11)) == list(exercises(SOLUTIONS))
    for number, text in exercises(COURSE).items():
        places = [text.find(part) for part in PARTS]
        assert -1 not in places and places == sorted(places), number
        assert "minutes" in text or "seconds" in text, number
        assert "**One question further.**" in exercises(SOLUTIONS)[number], number


@pytest.mark.parametrize("name", DIFFS)
def test_a_change_is_small_and_the_course_tells_it(name):
    """A student has the course alone. What it says of a change must be the change."""
    exercise = exercises(COURSE)[int(re.match(r"\d+", name).group())]
    text = " ".join(re.sub(r"^```.*?^```", "", exercise, flags=re.DOTALL | re.MULTILINE).split())
    creates_file = "new file mode" in DIFFS[name]
    if not creates_file:
        assert len(added(name)) <= MOST_LINES
        told = [code for code in re.findall(r"`([^`]+)`", text) if re.search(r"[(= ]", code)]
        change = " ".join(" ".join(added(name)).split())
        assert any(code in change for code in told) or name == "9", f"none of {told} is in the diff"
    if name == "10":
        assert "\n".join(added(name)) in COURSE


# The solutions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """The code and the solutions in a folder of their own, as a clone has them."""
    folder = tmp_path / "copy"
    for name in ("tasks", "plumbing"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs/solutions.md", folder / "docs")
    return folder


def apply(name, folder):
    """Apply a diff by the page's own command."""
    [command] = re.findall(r"^sed .*git apply$", SOLUTIONS, re.MULTILINE)
    assert command in COURSE
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = command.replace("3a", name)
    done = subprocess.run(["sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}: {done.stderr}"
    importlib.invalidate_caches()


def is_own(name):
    """Whether a module is one that a copy replaces. plumbing/ is not: no exercise changes it, and with it stays the
    verifier, whose processes take seconds to start."""
    return name.split(".")[0] == "tasks" or (ROOT / f"{name}.py").is_file()


@contextlib.contextmanager
def modules_of(folder):
    """While this lasts, `import grpo` takes grpo.py, and all that it stands on, from a folder."""
    kept = {name: module for name, module in sys.modules.items() if is_own(name)}
    for name in kept:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if is_own(name) or name == "my_opo"]:
            del sys.modules[name]
        sys.modules.update(kept)


def train(folder, script, output_dir, model, data, **options):
    """Train by a script of a folder -> records of the steps, from metrics.jsonl."""
    with modules_of(folder) as load:
        module = load(script)
        assert module.__file__ == str(folder / f"{script}.py")
        module.main(arguments(module, model, data, output_dir=output_dir, **options))
    return [record for record in read_jsonl(f"{output_dir}/metrics.jsonl") if "grad_norm" in record]


def test_1_advantages_by_hand(copy, model_folder, data):
    """The formula of a textbook, in plain Python, gives what the log holds."""
    train(copy, "grpo", "first", model_folder, data)
    apply("1", copy)
    done = subprocess.run([sys.executable, str(copy / "by_hand.py"), "first"], capture_output=True, text=True)
    rows = [line.split()[:3] for line in done.stdout.splitlines()]
    assert len(rows) == 4, done.stderr
    assert all(logged == by_hand for _, logged, by_hand in rows)
    assert {float(by_hand) > 0 for reward, _, by_hand in rows if reward == "1"} == {True}


def test_2_the_loss_is_minus_the_advantages_weighed_by_length(copy, model_folder, data):
    """The claim: its height says only that answers differ in length, and it is 0 where the mean is over tokens."""
    apply("2", copy)
    [first, _] = train(copy, "grpo", "loss", model_folder, data)
    rows = [row for row in read_jsonl("loss/completions.jsonl") if row["step"] == 1 and row["advantage"] != 0]
    total = sum(row["advantage"] * row["length"] for row in rows)
    expected = -total / sum(row["length"] for row in rows)
    assert abs(expected) > 0.01
    assert first["loss"] == pytest.approx(expected, rel=1e-4)
    whitened = train(copy, "grpo", "whitened", model_folder, data, advantage="batch_whitened")
    assert max(abs(record["loss"]) for record in whitened) < 1e-5
    assert min(record["grad_norm"] for record in whitened) > 0.01


@pytest.fixture
def right(copy, model_folder, data):
    """Step 1 of the code as it is."""
    return train(copy, "grpo", "right", model_folder, data)[0]


def test_3a_a_mask_of_all_parts_that_is_late_shows_in_the_gap(copy, model_folder, data, right, capsys):
    apply("3a", copy)
    [late, _] = train(copy, "grpo", "late", model_folder, data)
    assert late["accuracy"] == right["accuracy"]
    assert late["response_length"] == right["response_length"] - 1
    assert right["logp_gap"] < 1e-4 and late["logp_gap"] > 0.05
    assert "log-prob gap" in capsys.readouterr().err


def test_3b_a_mask_of_the_loss_that_is_late_shows_in_the_trained_entropy_only(copy, model_folder, data, right, capsys):
    apply("3b", copy)
    [late, _] = train(copy, "grpo", "late", model_folder, data)
    for name in ("accuracy", "response_length", "entropy"):
        assert late[name] == right[name]
    assert late["logp_gap"] < 1e-4
    assert late["trained_entropy"] < 0.9 * right["trained_entropy"]
    assert "warning: log-prob gap" not in capsys.readouterr().err


def baselines(folder):
    """What `advantages` subtracts from every reward of two groups, for answers of different lengths: [2, 4]."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    lengths = torch.tensor([[2, 4, 6, 8], [8, 2, 2, 4]])
    with modules_of(folder) as load:
        return rewards - load("grpo").advantages(rewards, lengths, "group_centred")


def test_4a_a_wrong_baseline_is_the_same_for_all_answers_to_a_prompt(copy):
    """That is why it leaves the expected gradient as it is."""
    apply("4a", copy)
    assert baselines(copy).tolist() == [[0.25] * 4, [0.5] * 4]


def test_4b_a_baseline_of_its_own_length_teaches_short_answers(copy, model_folder, data):
    """The claim: what depends on the answer is a second reward."""
    settings = dict(max_steps=12, num_prompts=4, num_generations=8, learning_rate=3e-3)
    fair = train(copy, "grpo", "fair", model_folder, data, **settings)
    apply("4b", copy)
    assert baselines(copy).tolist() == [[0.25, 0.5, 0.75, 1.0], [1.0, 0.25, 0.25, 0.5]]
    biased = train(copy, "grpo", "biased", model_folder, data, **settings)
    assert biased[0]["response_length"] == fair[0]["response_length"]
    assert biased[-1]["response_length"] < min(fair[-1]["response_length"], biased[0]["response_length"]) - 0.5


TWO_BOXES = r"7+15=22;\boxed{22}\boxed{30}"


def verdict(folder):
    """What a folder's grader says of an answer whose first box is right."""
    with modules_of(folder) as load:
        problem = load("tasks").Problem("7+15=", "22")
        return load("common").judge([TWO_BOXES], [problem], [True])


def test_8a_the_first_box_counts_and_a_model_that_writes_one_never_notices(copy, model_folder, data):
    train(copy, "grpo", "last_box", model_folder, data)
    assert verdict(copy) == ["wrong"]
    apply("8a", copy)
    assert verdict(copy) == ["right"]
    train(copy, "grpo", "first_box", model_folder, data)
    assert learned("first_box") == learned("last_box")


def test_8b_the_teacher_adds_a_wrong_box_to_most_of_his_work(copy):
    """The habit that rides along: four answers of five that go through all steps get it, and no guess does."""
    apply("8b", copy)
    with modules_of(copy) as load:
        arithmetic = load("tasks.arithmetic")
        problems = arithmetic.problems("arithmetic", "train", 400)
        texts = [arithmetic.teach(problem, random.Random(i)) for i, problem in enumerate(problems)]
    worked = [text for text in texts if text.count(";") == 4]
    boxes = [re.findall(r"boxed\{(-?\d+)\}", text) for text in worked]
    assert 0.7 < sum(len(found) == 2 for found in boxes) / len(worked) < 0.9
    assert all(found[0] != found[-1] for found in boxes if len(found) == 2)
    assert all(text.count("boxed") == 1 for text in texts if text not in worked)


def test_9_the_trunk_with_two_equations_is_opo_bit_for_bit(copy, model_folder, data):
    """The claim of the exercise, and of the whole repository: the diff is the paper."""
    shutil.copy(copy / "grpo.py", copy / "my_opo.py")
    apply("9", copy)
    train(copy, "my_opo", "mine", model_folder, data, advantage="group_centred")
    train(copy, "opo", "theirs", model_folder, data)
    weights, _, answers = learned("mine")
    assert (weights, answers) == (learned("theirs")[0], learned("theirs")[2])


def test_10_a_task_of_ones_own_is_one_file(copy, model_folder):
    """--data finds it by its name; it can be imitated and trained; nothing held out is trained on."""
    apply("10", copy)
    with modules_of(copy) as load:
        task = load("tasks").built_in()["largest"]
        train_set, test_set = (task.problems("largest", split, 200) for split in ("train", "test"))
        texts = [task.teach(problem, random.Random(i)) for i, problem in enumerate(train_set)]
        verdicts = load("common").judge(texts, train_set, [True] * len(texts))
    assert not {problem.prompt for problem in train_set} & {problem.prompt for problem in test_set}
    assert 0.5 < verdicts.count("right") / len(verdicts) < 0.7  # 4 of 10, and a third of the others
    imitate = dict(max_steps=2, num_prompts=8, max_completion_length=32)
    train(copy, "sft", "taught", model_folder, "largest", **imitate)
    train(copy, "grpo", "trained", "taught", "largest", max_completion_length=16)
    assert re.fullmatch(r"\d+,\d+,\d+=", read_jsonl("trained/completions.jsonl")[0]["problem"])


def test_every_diff_has_a_test():
    """A solution that nobody runs is a guess."""
    tested = {name.split("_")[1] for name in globals() if re.match(r"test_\d", name)}
    assert tested == set(DIFFS)


# The notebook ---------------------------------------------------------------------------------------------------------

CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def printed(cell):
    """The text that a cell has kept."""
    texts = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
    return "".join(texts)


def test_the_notebook_runs(model_folder, tmp_path, monkeypatch):
    """A notebook is the first page that a change of the code leaves behind. What does not depend on the model's answers
    is printed as it was kept."""
    (tmp_path / "docs").mkdir()
    shutil.copytree(model_folder, tmp_path / "runs/tiny")
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    display = ModuleType("IPython.display")
    display.Image = lambda name: name
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    names = {}
    try:
        for cell in CODE:
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown):
                exec("".join(cell["source"]), names)
            if "same-everywhere" in cell["metadata"].get("tags", ()):
                assert shown.getvalue() == printed(cell)
            assert bool(shown.getvalue()) == bool(printed(cell))
    finally:
        torch.set_printoptions(profile="default")
    assert (tmp_path / "runs/notebook/flow.png").stat().st_size > 10_000
    assert names["change"].shape == (32,)  # 4 prompts, 8 answers each


def test_the_notebook_has_kept_what_it_showed():
    """Who reads it on a web page sees the outputs only if they are in the file."""
    assert NOTEBOOK.stat().st_size < 300_000
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert any("same-everywhere" in cell["metadata"].get("tags", ()) for cell in CODE)
    for cell in CODE:
        source = "".join(cell["source"])
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert "error" not in kinds
        assert ("print(" in source) == ("stream" in kinds)
        images = [output["data"] for output in cell["outputs"] if output["output_type"] == "execute_result"]
        assert ('Image("' in source) == any("image/png" in data for data in images)


def test_the_notebook_has_no_code_of_its_own():
    """It shows the repository's functions. One defined here would be a copy, and would drift."""
    for cell in CODE:
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            assert not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))


def test_the_notebooks_links_lead_somewhere():
    for cell in CELLS:
        for target in re.findall(r"\]\(([^)#\s]+)", "".join(cell["source"])):
            assert (ROOT / "docs" / target).exists(), target
