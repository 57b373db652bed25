"""benchmarks/compare.py: which runs make a pair, what their differences are, and when two ways to train differ."""

import importlib.util
import json

import pytest
from helpers import ROOT, run_script

SPEC = importlib.util.spec_from_file_location("measured_compare", ROOT / "benchmarks" / "compare.py")
compare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare)


def write_run(folder, accuracies, every=10, **metrics):
    """A run folder with an evaluation every so many steps, and a training step that is none."""
    folder.mkdir(parents=True)
    records = [{"step": 1, "accuracy": 0.9}]
    for i, accuracy in enumerate(accuracies):
        record = {"step": every * i, "eval_accuracy": accuracy}
        for name, values in metrics.items():
            record[name] = values[i]
        records.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def printed(capsys, *options):
    """What the benchmark prints for options, as lines without the spaces that align its columns."""
    compare.main(compare.parse([str(option) for option in options]))
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_a_way_is_all_runs_that_differ_in_their_seed(tmp_path):
    """runs/grpo is neither runs/grpo_4-0 nor runs/grpo-old; a run that has made no evaluation yet is no evidence."""
    for name in ("grpo-0", "grpo-12", "grpo_4-0", "grpo-old", "grpo-1-2"):
        write_run(tmp_path / name, [0.1, 0.2])
    write_run(tmp_path / "grpo-5", [])
    runs = compare.runs_of(str(tmp_path / "grpo"))
    assert sorted(runs) == [0, 12]
    assert [record["step"] for record in runs[0]] == [0, 10]


def test_a_metric_that_is_no_number_is_left_out(tmp_path, capsys):
    """An entropy that was not finite is null in the log. One such evaluation must not end the table in a traceback."""
    write_run(tmp_path / "a-0", [0.1, 0.2, 0.9], eval_entropy=[1.0, None, 0.3])
    write_run(tmp_path / "a-1", [0.1, 0.2, 0.9], eval_entropy=[1.0, 0.5, 0.3])
    lines = printed(capsys, tmp_path / "a", "--metrics", "eval_entropy", "--steps", 10)
    assert "| a | 0.500 (1) |" in lines
    lines = printed(capsys, tmp_path / "a", "--metrics", "eval_entropy", "--at_accuracy", 0.55)
    assert "| a | 0.400 (1) |" in lines


def test_differences_are_taken_seed_by_seed(tmp_path, capsys):
    """By hand: 0.1 more in every seed is a difference, although the seeds are far apart and the intervals overlap."""
    for seed, accuracy in enumerate([0.2, 0.5, 0.8]):
        write_run(tmp_path / f"a-{seed}", [0.1, accuracy])
        write_run(tmp_path / f"b-{seed}", [0.1, accuracy + 0.1])
    lines = printed(capsys, tmp_path / "a", tmp_path / "b")
    half = 4.303 * 0.3 / 3**0.5  # the t quantile of three seeds, their standard deviation 0.3
    assert f"| a | 0.500 ± {half:.3f} (3) |" in lines
    assert f"| b | 0.600 ± {half:.3f} (3) |" in lines
    assert "| b | +0.100 ± 0.000 (3) * |" in lines
    assert lines[-1].startswith("1 comparisons, 1 of which")


def test_the_first_way_is_the_one_that_is_subtracted(tmp_path, capsys):
    write_run(tmp_path / "a-0", [0.1, 0.2])
    write_run(tmp_path / "b-0", [0.1, 0.5])
    assert "| b | +0.300 (1) |" in printed(capsys, tmp_path / "a", tmp_path / "b")
    assert "| a | -0.300 (1) |" in printed(capsys, tmp_path / "b", tmp_path / "a")


def test_only_seeds_of_both_make_pairs(tmp_path, capsys):
    """A lucky seed that the other way never had would otherwise decide."""
    for seed, accuracy in {0: 0.2, 1: 0.3, 7: 0.9}.items():
        write_run(tmp_path / f"a-{seed}", [0.1, accuracy])
    for seed, accuracy in {0: 0.2, 1: 0.3, 8: 0.1}.items():
        write_run(tmp_path / f"b-{seed}", [0.1, accuracy])
    lines = printed(capsys, tmp_path / "a", tmp_path / "b")
    assert "| b | +0.000 ± 0.000 (2) |" in lines


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.1, 0.1, 0.1], True),
        ([-0.1, -0.2, -0.15], True),
        ([0.1, -0.1, 0.2], False),
        ([0.0, 0.0], False),
        ([0.5], False),
        ([], False),
    ],
    ids=["above", "below", "both_sides", "equal", "one_seed", "none"],
)
def test_two_ways_differ_where_the_interval_leaves_zero_out(values, expected):
    assert compare.differs(values) is expected


def test_comparisons_are_counted(tmp_path, capsys):
    """Two metrics, two steps, two ways beside the first: eight. What rests on one seed is not one of them."""
    for way in "abc":
        for seed in (0, 1):
            write_run(tmp_path / f"{way}-{seed}", [0.1, 0.2], eval_entropy=[1.0, 0.5])
    write_run(tmp_path / "d-0", [0.1, 0.3], eval_entropy=[1.0, 0.4])
    ways = [tmp_path / way for way in "abcd"]
    lines = printed(capsys, *ways, "--steps", 0, 10, "--metrics", "eval_accuracy", "eval_entropy")
    assert lines[-1].startswith("8 comparisons, 0 of which")


def test_a_metric_at_an_accuracy_lies_between_two_evaluations():
    """By hand: 0.6 is two thirds of the way from 0.4 to 0.7, the second time it does not count."""
    records = [
        {"step": 0, "eval_accuracy": 0.4, "eval_entropy": 0.3},
        {"step": 30, "eval_accuracy": 0.7, "eval_entropy": 0.0},
        {"step": 60, "eval_accuracy": 0.5, "eval_entropy": 5.0},
        {"step": 90, "eval_accuracy": 0.9, "eval_entropy": 9.0},
    ]
    assert compare.at_accuracy(records, "eval_entropy", 0.6) == pytest.approx(0.1)
    assert compare.at_accuracy(records, "step", 0.6) == pytest.approx(20)
    assert compare.at_accuracy(records, "step", 0.7) == pytest.approx(30)
    assert compare.at_accuracy(records, "step", 0.95) is None
    assert compare.at_accuracy(records, "kl_to_start", 0.6) is None


def test_without_steps_it_is_the_last_evaluation_of_each_run(tmp_path, capsys):
    """The second half of a chain of runs counts its steps from 0, and ends where the first one ends."""
    write_run(tmp_path / "a-0", [0.1, 0.2, 0.3])
    write_run(tmp_path / "b-0", [0.1, 0.4])
    assert "| b | +0.100 (1) |" in printed(capsys, tmp_path / "a", tmp_path / "b")
    assert "| b | - |" in printed(capsys, tmp_path / "a", tmp_path / "b", "--steps", 20)


@pytest.mark.parametrize(
    "options, told",
    [
        (["runs/gone"], ["runs/gone: no evaluated run", "--output_dir runs/gone-0"]),
        (["a", "--metrics", "eval_acuracy"], ["--metrics eval_acuracy", "eval_accuracy, step"]),
        (["a", "a"], ["listed twice"]),
        (["a", "--steps", "3", "--at_accuracy", "0.5"], ["--at_accuracy", "drop --steps"]),
    ],
    ids=["no_run", "no_metric", "twice", "both"],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, options, told):
    write_run(tmp_path / "a-0", [0.1, 0.2])
    done = run_script("benchmarks/compare.py", *options, folder=tmp_path)
    assert done.returncode == 2
    for piece in told:
        assert piece in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
