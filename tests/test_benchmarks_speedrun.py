"""The speedrun: when an accuracy stays, what is counted until then, and that a run is left alone."""

import importlib.util

import pytest
from helpers import ROOT, arguments, read_jsonl

import bookkeeping
import common
import grpo
from variants import dapo

SPEC = importlib.util.spec_from_file_location("measured_speedrun", ROOT / "benchmarks" / "speedrun.py")
speedrun = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(speedrun)


@pytest.mark.parametrize(
    "accuracies, step",
    [
        ([0.3, 0.86, 0.84, 0.87, 0.88], 30),
        ([0.86, 0.87], 0),
        ([0.3, 0.9], None),
        ([0.85, 0.85, 0.85], None),
        ([], None),
    ],
    ids=["not_the_first_time", "at_once", "not_confirmed", "not_above", "no_evaluation"],
)
def test_an_accuracy_stays_if_two_evaluations_in_a_row_are_above(accuracies, step):
    """One lucky evaluation is no record: with 1,024 answers, one in thirty is two points too high."""
    evaluations = [(10 * i, accuracy) for i, accuracy in enumerate(accuracies)]
    assert speedrun.first_to_stay(evaluations) == step


def test_what_is_counted_is_what_the_run_logged(model_folder, data):
    """Samples and tokens that nobody sampled, or seconds of an evaluation, decide who wins."""
    watch = speedrun.Watch()
    with watch.patch(bookkeeping.Run, common):
        grpo.main(arguments(grpo, model_folder, data, max_steps=3, eval_steps=1))
    answers = read_jsonl("run/completions.jsonl")
    records = [record for record in read_jsonl("run/metrics.jsonl") if "seconds" in record]
    assert len(watch.evaluations) == 4 and len(records) == 3
    found = watch.result()
    assert found["steps"] is None
    assert found["samples"] == len(answers) == 24
    assert found["tokens"] == sum(answer["length"] for answer in answers)
    logged = sum(record["seconds"] for record in records)
    assert logged <= found["seconds"] < 1.3 * logged + 0.1

    watch.evaluations = [(0, 0.2), (1, 0.9), (2, 0.9), (3, 0.9)]
    until = watch.result()
    assert until["steps"] == 1 and until["samples"] == 8
    assert until["processor"] < found["processor"]


def test_the_run_ends_when_the_goal_is_confirmed(model_folder, data, monkeypatch):
    """Ten minutes more for nothing, in each of ten runs."""
    monkeypatch.setattr(speedrun, "GOAL", -1.0)
    watch = speedrun.Watch()
    with watch.patch(bookkeeping.Run, common), pytest.raises(speedrun.Reached):
        grpo.main(arguments(grpo, model_folder, data, max_steps=3, eval_steps=1))
    assert [step for step, _ in watch.evaluations] == [0, 1]


def test_a_row_compares_with_the_defaults():
    base = dict(steps=60, seconds=200.0, processor=100.0, samples=1, tokens=1)
    found = dict(steps=None, seconds=50.0, processor=40.0, samples=256, tokens=5000)
    line = speedrun.row("opo.py", 3, found, base)
    assert line == "| `opo.py` | 3 | never | 256 | 5000 | 40 (0.40) | 50 (0.25) |"


def test_what_is_thrown_away_is_counted_too(data, model_folder, monkeypatch):
    """dapo.py samples prompts anew whose answers all earn the same. They are in no log, and they are its price."""
    monkeypatch.setattr(common, "REWARDS", {})  # nothing is right: every group is silent
    watch = speedrun.Watch()
    with watch.patch(bookkeeping.Run, common):
        dapo.main(arguments(dapo, model_folder, data, max_steps=1, eval_steps=0, extra_rounds=2))
    assert len(read_jsonl("run/completions.jsonl")) == 8
    assert watch.result()["samples"] == 3 * 8
