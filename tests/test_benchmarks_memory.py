"""The memory plan of benchmarks/memory.py: it is what live tensors take, and it moves with the options."""

import pytest
from helpers import run_script


@pytest.mark.parametrize(
    "only, models",
    [("wide", 1), pytest.param("", 4, marks=pytest.mark.slow)],
    ids=["one_model", "all"],
)
def test_the_plan_is_what_live_tensors_take(only, models):
    """A plan that is off sends people to rent a card that is too small, or one that costs twice as much."""
    done = run_script("benchmarks/memory.py", "--check", "--only", only, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()[1:]
    assert len(rows) == 2 * models  # with and without gradient checkpointing
    for row in rows:
        ratios = [float(word) for word in row.split()[-10:-3]]
        assert len(ratios) == 7
        assert min(ratios) > 0.85 and max(ratios) < 1.15


def planned(*options):
    """The plan for Qwen3-4B, GiB by component."""
    done = run_script("benchmarks/memory.py", *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = lines[0].split()[1:-2]  # what follows is: fits GB
    (row,) = [line for line in lines if line.startswith("Qwen3-4B")]
    figures = row.split()[1 : 1 + len(names)]
    return dict(zip(names, map(float, figures)))


@pytest.mark.slow
def test_the_plan_moves_with_the_options_as_memory_does():
    """Each of these options trades memory: the one component that it is for must follow."""
    base = planned()
    # 16 bytes a parameter: two for the weight, two for its gradient, four for the master, eight for the moments
    held = base["weights"] + base["gradients"] + base["optimizer"]
    assert held == pytest.approx(16 * 4.02e9 / 2**30, rel=0.01)
    critic = planned("--critic")
    for component in ("weights", "gradients", "optimizer"):
        assert critic[component] == pytest.approx(2 * base[component], rel=0.01)
    other = planned("--optimizer_device", "cpu", "--max_rollout_tokens", 2**16, "--micro_batch_tokens", 2**15)
    assert other["optimizer"] == 0
    assert other["cache"] < 0.3 * base["cache"]
    assert other["activations"] > 1.5 * base["activations"]


@pytest.mark.slow
def test_the_plan_of_several_gpus_shares_what_is_kept():
    """What every GPU keeps whole does not shrink with their number: a plan that divides it rents too few of them."""
    one = planned()
    plans = {gpus: planned("--gpus", gpus) for gpus in (2, 8)}
    for gpus, found in plans.items():
        kept = found["shares"] + found["gradients"] + found["optimizer"]
        assert kept == pytest.approx(16 * 4.02e9 / 2**30 / gpus, rel=0.01)
        assert found["gathered"] == one["weights"]
        assert found["cache"] == one["cache"]
    assert one["total"] > plans[2]["total"] > plans[8]["total"] > one["cache"] + one["weights"]
