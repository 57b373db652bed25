"""Run folders as other scripts find and name them."""

from pathlib import Path

import pytest
from helpers import write_jsonl

from plumbing.files import write_json
from plumbing.options import EMBEDDED_MODEL
from plumbing.runs import experiment, find_run, labels_of, start_of_chain, training_seconds


@pytest.mark.parametrize(
    "paths, labels",
    [
        (["runs/grpo", "runs/em/"], ["grpo", "em"]),
        (["x/test.jsonl", "y/test.jsonl"], ["x/test", "y/test"]),
        (["runs/em/best", "runs/em"], ["em/best", "em"]),
        (["runs/em/checkpoint-20"], ["em/checkpoint-20"]),
        (["grpo", "runs/grpo", "Qwen/Qwen3-0.6B"], ["grpo", "runs/grpo", "Qwen/Qwen3-0.6B"]),
    ],
)
def test_labels_are_the_shortest_that_tell_apart(paths, labels):
    assert labels_of(paths) == labels


@pytest.mark.parametrize(
    "label, name",
    [
        ("grpo-0", "grpo"),
        ("em_16-12", "em_16"),
        ("em-1/best", "em/best"),
        ("grpo-2/checkpoint-20", "grpo/checkpoint-20"),
        ("Qwen3-4B", "Qwen3-4B"),
        ("embedded", "embedded"),
    ],
)
def test_runs_of_one_experiment_differ_in_their_last_number(label, name):
    """Averaging two checkpoints of one run, or two models, as if they were seeds gives a number about nothing."""
    assert experiment(label) == name


def test_a_checkpoint_belongs_to_the_run_around_it(run_folder, model_folder):
    assert find_run(str(run_folder)) == find_run(str(run_folder / "checkpoint-2")) == run_folder
    assert find_run(str(model_folder / ".." / "start")) is None  # a plain model folder
    assert find_run("Qwen/Qwen3-0.6B") is None


def test_training_seconds_are_those_of_training_steps():
    """Evaluation records have no clock; a model that is no run, and the embedded model, have no time."""
    for folder in ("run", EMBEDDED_MODEL):
        Path(folder).mkdir(parents=True)
        records = [dict(step=0, eval_accuracy=0.5), dict(step=1, seconds=2.5), dict(step=2, seconds=0.5)]
        write_jsonl(Path(folder) / "metrics.jsonl", records)
    assert training_seconds("run") == 3.0
    assert training_seconds(str(EMBEDDED_MODEL)) is None and training_seconds("Qwen/Qwen3-0.6B") is None


@pytest.mark.parametrize("value", ["2.5", [2.5], None, True, float("nan"), float("inf"), 10**400])
def test_seconds_that_are_no_number_are_left_out(value):
    """One damaged line of a log ended the evaluation in a TypeError, before its first answer."""
    Path("run").mkdir()
    write_jsonl(Path("run/metrics.jsonl"), [dict(step=1, seconds=2.5), dict(step=2, seconds=value)])
    assert training_seconds("run") == 2.5


def made_run(folder, **options):
    Path(folder).mkdir(parents=True)
    write_json(Path(folder) / "args.json", options)


def test_a_chain_of_runs_begins_where_reinforcement_learning_began(capsys):
    """The KL of em.py -> grpo.py to the EM model was compared with that of a run from the base, and looked smaller."""
    made_run("runs/tiny", script="sft.py", model="runs/tiny/start")
    made_run("runs/em", script="em.py", model="runs/tiny")
    made_run("runs/em_grpo", script="grpo.py", model="runs/em/best")
    made_run("runs/more", script="bupo.py", model="runs/em_grpo/checkpoint-20")
    Path("runs/em/best").mkdir()
    Path("runs/em_grpo/checkpoint-20").mkdir()
    made_run("runs/hub", script="grpo.py", model="Qwen/Qwen3-4B")
    made_run("runs/other", epochs=3)  # another program's
    assert start_of_chain("runs/more") == start_of_chain("runs/em") == start_of_chain("runs/tiny") == "runs/tiny"
    assert start_of_chain("runs/hub") == "Qwen/Qwen3-4B"
    for model in ("embedded", "runs/other", "Qwen/Qwen3-4B"):
        assert start_of_chain(model) == model
    assert capsys.readouterr().err == ""


def test_a_chain_whose_beginning_is_gone_begins_behind_it(capsys):
    made_run("runs/a", script="grpo.py", model="runs/gone")
    made_run("runs/b", script="grpo.py", model="runs/a")
    made_run("runs/c", script="grpo.py", model="runs/d")  # each was trained over what the other one came from
    made_run("runs/d", script="grpo.py", model="runs/c")
    assert start_of_chain("runs/b") == "runs/a"
    assert start_of_chain("runs/c") == "runs/d"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "runs/gone" in told[0] and "KL is to runs/a" in told[0]
