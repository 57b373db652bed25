"""Problems: built-in tasks, files and data sets of the hub in all their shapes, system prompts, limits, and the way
back from a log."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, write_jsonl

import tasks
from plumbing import verifier
from plumbing.errors import UserError
from tasks.countdown import CountdownProblem

MESSAGES = [{"role": "user", "content": "What is 1+2?"}]


def test_tasks_are_found_by_their_files():
    """A new task is a new file. No other file knows its name."""
    found = tasks.built_in()
    assert list(found) == ["arithmetic", "countdown", "countdown-small", "words", "words-unseen"]
    assert found["countdown"] is found["countdown-small"] is sys.modules["tasks.countdown"]
    for name, task in found.items():
        assert name in task.NAMES
        [problem] = task.problems(name, "test", 1)
        assert problem.verdict(f"\\boxed{{{problem.answer}}}") in (None, "right")


def test_tasks_need_no_torch():
    """It takes seconds to import; problems and verdicts can be looked at without."""
    program = "import sys, tasks; tasks.load_problems('countdown'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, prompt, answer",
    [
        ({"problem": "1+2?", "answer": "3"}, "1+2?", "3"),
        ({"question": "1+2?", "final_answer": "3"}, "1+2?", "3"),
        ({"prompt": MESSAGES, "answer": "3"}, MESSAGES, "3"),
        ({"problem": "1+2?", "solution": r"First \boxed{4}, no: \boxed{3}."}, "1+2?", "3"),
        ({"problem": "1+2?", "answer": "3", "solution": r"On the way \boxed{4}"}, "1+2?", "3"),
        ({"problem": "1+2?", "answer": 3, "id": 7}, "1+2?", "3"),
        ({"problem": "1-1?", "answer": 0}, "1-1?", "0"),  # 0 is an answer, not a missing one
        ({"problem": "1/2?", "answer": 0.5}, "1/2?", "0.5"),
        ({"problem": "1+2?", "answer": " 3\n"}, "1+2?", "3"),
        ({"problem": "1+2?", "answer": "", "final_answer": "3"}, "1+2?", "3"),
        ({"problem": None, "question": "1+2?", "answer": None, "solution": r"\boxed{3}"}, "1+2?", "3"),
        ({"problem": "\u221a9 \u2028 \u00fc?", "answer": "3"}, "\u221a9 \u2028 \u00fc?", "3"),  # \u2028 ends no line
    ],
)
def test_jsonl_rows_of_every_shape(row, prompt, answer, tmp_path):
    """Data sets name their fields differently; a file that loads with the wrong field trains on the wrong problem."""
    problems = tasks.load_problems(str(write_jsonl(tmp_path / "data.jsonl", [row, row])))
    assert [(problem.prompt, problem.answer) for problem in problems] == [(prompt, answer)] * 2
    assert [problem.where for problem in problems] == [f"{tmp_path}/data.jsonl:1", f"{tmp_path}/data.jsonl:2"]


def test_a_data_set_of_the_hub_is_asked_for_its_split(monkeypatch):
    """Its training split in place of the held-out one: an evaluation that measures memory."""
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [{"problem": "1+2?", "answer": "3"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    [problem] = tasks.load_problems("lab/sums", "test")
    assert asked == [("lab/sums", "test")]
    assert (problem.prompt, problem.answer, problem.where) == ("1+2?", "3", "lab/sums:0")


# GSM8K ---------------------------------------------------------------------------------------------------------------

GSM8K = [
    {"question": "How many clips?", "answer": "She sold 48/2 = <<48/2=24>>24.\n48+24 = <<48+24=72>>72\n#### 72"},
    {"question": "How many grains?", "answer": "20*61.7 = <<20*61.7=1234>>1,234 grains.\n#### 1,234"},
]


class Hub:
    """In place of the package `datasets`, with what it says (5.0) where the config of openai/gsm8k is missing or wrong.

    asked: what load_dataset was called with.
    """

    def __init__(self):
        self.asked = []

    def load_dataset(self, name, config=None, split=None):
        self.asked.append((name, config, split))
        if config is None:
            example = "Example of usage:\n\t`load_dataset('openai/gsm8k', 'main')`"
            configs = "Please pick one among the available configs: ['main', 'socratic']"
            raise ValueError(f"Config name is missing.\n{configs}\n{example}")
        if config not in ("main", "socratic"):
            raise ValueError(f"BuilderConfig '{config}' not found. Available: ['main', 'socratic']")
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'test'].")
        return GSM8K


@pytest.fixture
def hub(monkeypatch):
    """The fake package `datasets`, ready to be imported."""
    fake = Hub()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_gsm8k_comes_from_the_hub_by_its_config(hub):
    """The data set that everybody tries first has two configs, and the hub refuses a name without one."""
    train = tasks.load_problems("openai/gsm8k:main")
    assert [problem.question() for problem in train] == ["How many clips?", "How many grains?"]
    assert [problem.answer for problem in train] == ["72", "1234"]
    assert [problem.where for problem in train] == ["openai/gsm8k:main:0", "openai/gsm8k:main:1"]
    tasks.load_problems("openai/gsm8k:socratic", "test")
    assert hub.asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "socratic", "test")]


@pytest.mark.parametrize("name", ["openai/gsm8k", "openai/gsm8k:mian"])
def test_the_configs_are_named_where_one_is_missing_or_wrong(name, hub):
    """Five lines of the library, cut off before the names, leave the user to look for them on the hub's pages."""
    with pytest.raises(UserError) as error:
        tasks.load_problems(name)
    expected = "the data set has the configs main, socratic; pass one behind its name: openai/gsm8k:main"
    assert str(error.value) == f"{name}: {expected}"


def test_a_split_that_is_missing_is_no_config_that_is_missing(hub):
    with pytest.raises(UserError, match="gsm8k:main, split dev: cannot be loaded .*Unknown split.*; check the name"):
        tasks.load_problems("openai/gsm8k:main", "dev")


def write_json(rows):
    Path("gsm8k.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return "gsm8k.json"


def write_lines(rows):
    return str(write_jsonl(Path("gsm8k.json"), rows))


@pytest.mark.parametrize("write", [write_json, write_lines], ids=["array", "lines"])
def test_a_json_file_is_an_array_or_has_a_row_a_line(write):
    """Both are called .json, and both are found beside papers."""
    assert [problem.answer for problem in tasks.load_problems(write(GSM8K))] == ["72", "1234"]


def test_a_parquet_file_is_read_where_pyarrow_is(monkeypatch):
    """The files behind openai/gsm8k are such files; who downloads one should not have to convert it."""
    table = SimpleNamespace(to_pylist=lambda: GSM8K)
    parquet = SimpleNamespace(read_table=lambda path: {Path("main/train.parquet"): table}[path])
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
    problems = tasks.load_problems("main/train.parquet")
    assert [(problem.answer, problem.where) for problem in problems] == [
        ("72", "main/train.parquet:0"),
        ("1234", "main/train.parquet:1"),
    ]
    with pytest.raises(UserError, match="main/absent.parquet: cannot be read"):
        tasks.load_problems("main/absent.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="main/train.parquet: cannot be read .*; `pip install pyarrow` first"):
        tasks.load_problems("main/train.parquet")


@pytest.mark.parametrize(
    "answer, right",
    [
        ("So 24+48.\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### $1,234.50", "1234.50"),
        ("#### -5", "-5"),
        ("#### 2,125,000 dollars", "2125000"),
        ("#### 10 #### 20", "20"),
    ],
)
def test_what_a_model_boxes_is_right_against_gold_behind_hashes(answer, right, tmp_path):
    """A whole solution as gold answer, or '1,234 dollars', matches no completion: the reward is 0 for ever."""
    rows = [{"question": "How much?", "answer": answer}]
    [problem] = tasks.load_problems(str(write_jsonl(tmp_path / "gsm8k.jsonl", rows)))
    boxed = problem.final_answer(f"It is \\boxed{{{right}}}.")
    wrong = problem.final_answer(f"It is \\boxed{{{right}7}}.")
    assert verifier.compare([(problem.answer, boxed), (problem.answer, wrong)]) == ["right", "wrong"]


def test_answers_with_and_without_hashes_are_not_mixed(tmp_path):
    """Half of such a file would be trained on with golds that nobody can reach, and the reward would not show why."""
    rows = [*GSM8K, {"question": "1+2?"}, {"question": "1+2?", "answer": "1+2 is 3"}]
    path = write_jsonl(tmp_path / "mixed.jsonl", rows)
    with pytest.raises(UserError) as error:
        tasks.load_problems(str(path), labels=False)
    expected = f"{path}:4: no '####' in its answer, but in that of {path}:1; write all answers in one way"
    assert str(error.value) == expected
    write_jsonl(path, rows[:3])
    assert [problem.answer for problem in tasks.load_problems(str(path), labels=False)] == ["72", "1234", ""]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": "1+2?", "answer": "#### 3"}, "no problem; .*; found fields text, answer"),
        ({"question": "1+2?", "label": "#### 3"}, "no gold answer; .*; found fields question, label"),
        ({"question": "1+2?", "answer": "1+2=3\n####"}, "no gold answer; .*; found fields question, answer"),
    ],
)
def test_a_column_that_is_missing_is_named(row, words, monkeypatch):
    """The same for rows of the hub as for lines of a file: where, what is missing, and what is there."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *name, split: [*GSM8K, row]))
    with pytest.raises(UserError, match=f"openai/gsm8k:main:2: {words}"):
        tasks.load_problems("openai/gsm8k:main")


def test_labels_may_be_missing_where_none_is_needed(tmp_path, capsys):
    """em.py learns without labels; a row without answer must not stop it."""
    path = write_jsonl(tmp_path / "data.jsonl", [{"problem": "1+2?"}, {"problem": "1+2?", "answer": "3"}])
    assert [problem.answer for problem in tasks.load_problems(str(path), labels=False)] == ["", "3"]
    assert not capsys.readouterr().err  # a label that is not there is not one that cannot be read


def test_golds_that_cannot_be_parsed_are_listed(tmp_path, capsys):
    """Answers the verifier cannot read are compared as text only; unlisted, they are problems nobody solves."""
    rows = [{"problem": "?", "answer": "3"}, {"problem": "?", "answer": "}{"}]
    tasks.load_problems(str(write_jsonl(tmp_path / "data.jsonl", rows)))
    message = capsys.readouterr().err
    assert "data.jsonl:2" in message and "data.jsonl:1" not in message


def test_limit_takes_the_first_problems(data):
    """An evaluation on --eval_problems must take the same problems every time."""
    whole = tasks.load_problems(str(data))
    assert len(whole) == 12 and tasks.load_problems(str(data), limit=5) == whole[:5]


def test_system_prompt_goes_before_problems_that_have_none(tmp_path):
    """Two system messages, or none: the model is asked for another format than the one that is graded."""
    own = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    system = {"role": "system", "content": "Box it."}
    path = str(write_jsonl(tmp_path / "data.jsonl", [{"prompt": p, "answer": "3"} for p in ("1+2?", MESSAGES, own)]))
    problems = tasks.load_problems(path, system_prompt="Box it.")
    assert [problem.prompt for problem in problems] == [
        [system, {"role": "user", "content": "1+2?"}],
        [system, *MESSAGES],
        own,
    ]
    assert [problem.question() for problem in problems] == ["1+2?", "What is 1+2?", "What is 1+2?"]
    assert [problem.prompt for problem in tasks.load_problems(path)] == ["1+2?", MESSAGES, own]


# ---------------------------------------------------------------------------------------------------------------------
# The way back from a log
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arithmetic", "countdown", "countdown-small"])
@pytest.mark.parametrize("prompt_field", ["problem", "prompt"])
def test_a_problem_comes_back_from_its_record(name, prompt_field):
    """completions.jsonl names the prompt 'problem'; in a sample file that is the problem's number."""
    [problem] = tasks.load_problems(name, "test", 1)
    record = {"problem": 7, prompt_field: problem.prompt, "gold": problem.answer, **problem.record()}
    back = tasks.problem_from_record(record, problem.where)
    assert back == problem and type(back) is type(problem)


def test_only_countdown_keeps_numbers():
    plain = tasks.problem_from_record({"prompt": "1+2?", "gold": "3"})
    assert type(plain) is tasks.Problem and plain.record() == {}
    countdown = tasks.problem_from_record({"prompt": "1 2=3", "gold": "1+2", "numbers": [1, 2], "target": 3})
    assert type(countdown) is CountdownProblem and countdown.record() == {"numbers": [1, 2], "target": 3}
