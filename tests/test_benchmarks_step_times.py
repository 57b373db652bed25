"""The step times: which steps count, and to which run a ratio is."""

import importlib.util

from helpers import ROOT

SPEC = importlib.util.spec_from_file_location("measured_step_times", ROOT / "benchmarks" / "step_times.py")
step_times = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(step_times)


def test_steps_that_allocate_and_evaluations_do_not_count():
    records = [dict(step=0, eval_accuracy=0.2), dict(step=1, seconds=9.0), dict(step=2, seconds=8.0)]
    records += [dict(step=3, seconds=1.0), dict(step=3, eval_accuracy=0.3), dict(step=4, seconds=2.0)]
    records += [dict(step=5, seconds=6.0)]
    assert step_times.median_seconds(records) == 2.0


def test_a_ratio_is_to_the_run_of_the_same_round():
    """The machine was three times slower in the second round: that is no difference between two scripts."""
    rounds = [{"grpo.py": 1.0, "ppo.py": 2.0}, {"grpo.py": 3.0, "ppo.py": 6.6}, {"grpo.py": 1.0, "ppo.py": 1.9}]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in step_times.table(rounds).splitlines()]
    assert rows[2] == ["`grpo.py`", "1.00", "1.00", "1.00, 1.00"]
    assert rows[3] == ["`ppo.py`", "2.00", "2.00", "1.90, 2.20"]
