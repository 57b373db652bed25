"""Resuming and repeating: a run that was stopped in any way goes on as if nothing had happened, bit for bit."""

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import arguments, assert_same_run, interrupt, learned, read_jsonl, write_jsonl
from tqdm import tqdm

import bookkeeping
import bupo
import common
import grpo
import sft
from plumbing import figures
from plumbing.errors import UserError
from plumbing.runs import step_of


@pytest.fixture
def args_for(model_folder, data):
    """A function (script, data, options) -> its Args for four steps with unequal rewards in each."""

    def make(script, source=data, **options):
        settings = dict(max_steps=4, num_prompts=3, save_steps=1, save_total_limit=0, eval_steps=2, output_dir="cut")
        if script is bupo:
            settings["internal_steps"] = 2
        return arguments(script, model_folder, source, **settings | options)

    return make


@pytest.fixture
def whole(args_for):
    """The folder of a run of grpo.py that nobody disturbed."""
    grpo.main(args_for(grpo, output_dir="whole"))
    return "whole"


# ---------------------------------------------------------------------------------------------------------------------
# Stopped by a signal
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, stop", [("grpo", 2), ("bupo", 1), ("bupo", 2), ("bupo", 3), ("opo", 2), ("ppo", 2)])
def test_a_resumed_run_is_the_uninterrupted_one(name, stop, args_for, capsys):
    """Lost moments, repeated problems, the wrong phase or other random numbers: a kink in every curve."""
    script = importlib.import_module(name)
    script.main(args_for(script, output_dir="whole"))
    interrupt(script, args_for(script), stop)
    assert "resume" in capsys.readouterr().err.splitlines()[-1]
    assert step_of(Path(f"cut/checkpoint-{stop}")) == stop and not Path("cut/model.safetensors").exists()
    script.main(args_for(script))
    assert_same_run("cut", "whole")
    assert [record["step"] for record in read_jsonl("cut/metrics.jsonl") if "reward" in record] == [1, 2, 3, 4]


def test_a_resumed_run_has_the_same_coins_rates_and_blocks(args_for):
    """Coins of a generator that starts anew, or moments of the wrong weights: a control that a kill has changed."""
    options = dict(reward="random", train_blocks="1:3", lr_below="2:0.1")
    grpo.main(args_for(grpo, output_dir="whole", **options))
    interrupt(grpo, args_for(grpo, **options), 2)
    grpo.main(args_for(grpo, **options))
    assert_same_run("cut", "whole")


def test_imitation_resumes_with_its_schedule(args_for, data, model_folder):
    """A warm-up that starts again, or a decay counted from the restart, is another schedule."""
    trajectories = model_folder.parent / "trajectories.jsonl"
    args = args_for(sft, trajectories, eval_data=str(data))
    sft.main(args_for(sft, trajectories, eval_data=str(data), output_dir="whole"))
    interrupt(sft, args, 2)
    sft.main(args)
    assert_same_run("cut", "whole")


def test_a_second_signal_stops_at_once(args_for, monkeypatch):
    """A step of a large model takes minutes: who presses Ctrl-C twice does not want to wait for it."""

    def sample(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(common, "sample", sample)
    with pytest.raises(SystemExit) as end:
        grpo.main(args_for(grpo, eval_steps=0))
    assert end.value.code == 143 and not list(Path("cut").glob("checkpoint-*"))


def test_a_signal_while_the_final_model_is_written_does_not_cut_it(args_for, monkeypatch):
    """The last step is done and its model is being written: a signal now must not lose it."""
    real_rename = os.rename

    def rename(source, target):
        if Path(target).name == "final":
            signal.raise_signal(signal.SIGTERM)
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    grpo.main(args_for(grpo, save_steps=0))
    assert step_of(Path("cut")) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Crashed and killed
# ---------------------------------------------------------------------------------------------------------------------


def test_a_crash_loses_only_the_steps_since_the_checkpoint(args_for, monkeypatch):
    """Steps logged after the last checkpoint are trained again: their lines must not stand in the log twice."""
    bupo.main(args_for(bupo, output_dir="whole"))
    real_save = bookkeeping.Run.save

    def save(run, step):
        if step == 3:
            raise MemoryError("the machine goes down after the log, before the checkpoint")
        real_save(run, step)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(bookkeeping.Run, "save", save)
        bupo.main(args_for(bupo, save_steps=2))
    assert read_jsonl("cut/metrics.jsonl")[-1]["step"] == 3
    with open("cut/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rewa')  # and a line that was being written
    with open("cut/completions.jsonl", "ab") as file:
        file.write('{"step": 3, "text": "\u00fc'.encode()[:-1])  # cut inside a character
    bupo.main(args_for(bupo, save_steps=2))
    assert_same_run("cut", "whole")


def test_a_half_written_checkpoint_is_never_chosen(args_for, whole):
    """Killed while it was saving: the newest folder is the broken one, and resuming from it fails or, worse, works."""
    interrupt(grpo, args_for(grpo), 2)
    shutil.copytree("cut/checkpoint-2", "cut/checkpoint-3.tmp")
    Path("cut/checkpoint-3.tmp/trainer_state.json").write_text('{"step": 3}')
    Path("cut/checkpoint-9").mkdir()
    Path("cut/checkpoint-9/model.safetensors").write_bytes(b"half")
    grpo.main(args_for(grpo))
    assert_same_run("cut", whole)


def test_a_kill_while_saving_leaves_the_last_checkpoint_whole(args_for, whole, monkeypatch):
    """A checkpoint written in place of the previous one: a kill in between leaves none at all."""
    real_save = torch.save
    saves = []

    def save(*args, **kwargs):
        saves.append(args)
        if len(saves) == 3:
            raise KeyboardInterrupt  # in the middle of the third checkpoint, weights on disk, optimizer not
        real_save(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", save)
        grpo.main(args_for(grpo, save_total_limit=1))
    grpo.main(args_for(grpo, save_total_limit=1))
    assert_same_run("cut", whole)
    assert [path.name for path in Path("cut").glob("checkpoint-*")] == ["checkpoint-3"]


PATIENCE = 120  # seconds for a run of seconds


def train(args):
    """Run in a process of its own, to be killed."""
    figures.draw_curves = lambda folder: None
    tqdm.set_lock(threading.RLock())  # else one for all forks: a victim killed while it draws its bar would keep it
    bupo.main(args)


def process(args):
    """`train` in a process that starts within milliseconds: a fork; where that could hold a GPU, one of a server's."""
    context = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")
    started = context.Process(target=train, args=(args,))
    started.start()
    return started


def wait_until_saving(folder, seconds):
    """Until a checkpoint is being written, at most so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not list(Path(folder).glob("*.tmp/*")):
        time.sleep(0.0005)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment(kills, args_for):
    """SIGKILL at random moments of twelve steps, in both phases, and while a checkpoint is being written: after the
    last start weights, metrics and answers are those of the run that nobody touched."""

    def start(folder):
        options = dict(max_steps=12, internal_steps=6, eval_steps=8, save_total_limit=2)
        return process(args_for(bupo, output_dir=folder, **options))

    begin = time.monotonic()
    start("whole").join(PATIENCE)
    duration = time.monotonic() - begin
    generator = random.Random(kills)
    for kill in range(kills):
        folder = f"cut{kill}"
        victim = start(folder)
        time.sleep(generator.uniform(0, duration))
        if kill % 2:
            wait_until_saving(folder, duration)
        victim.kill()
        victim.join()
        second = start(folder)
        second.join(PATIENCE)
        assert second.exitcode == 0  # None: it hangs
        assert_same_run(folder, "whole")
        assert not list(Path(folder).glob("*.tmp"))


# ---------------------------------------------------------------------------------------------------------------------
# With other options
# ---------------------------------------------------------------------------------------------------------------------


def test_more_steps_continue_a_finished_run(args_for, whole):
    """--max_steps raised afterwards gives the run that was long from the start."""
    for steps in (2, 4):
        grpo.main(args_for(grpo, max_steps=steps, save_steps=0))
    assert_same_run("cut", whole)


def test_extending_a_finished_run_keeps_it_until_the_new_one_is_whole(args_for, whole, monkeypatch):
    """A finished run without checkpoints is its own checkpoint: dropped at the start, a kill loses everything."""
    grpo.main(args_for(grpo, max_steps=2, save_steps=0))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(common, "grade_rollouts", lambda *args: 1 / 0)  # dies in step 3
        grpo.main(args_for(grpo, save_steps=0))
    grpo.main(args_for(grpo, save_steps=0))
    assert read_jsonl("cut/completions.jsonl") == read_jsonl("whole/completions.jsonl")


def test_fewer_steps_than_trained_are_not_claimed(args_for, whole):
    """--max_steps lowered below the checkpoint: under the lower number, the steps beyond would be trained twice."""
    interrupt(grpo, args_for(grpo), 3)
    grpo.main(args_for(grpo, max_steps=2))
    assert step_of(Path("cut")) == 3
    grpo.main(args_for(grpo))
    assert_same_run("cut", whole)


def test_bookkeeping_options_may_change(args_for):
    """More steps, other evaluations, a smaller memory: none of them makes it another experiment."""
    interrupt(bupo, args_for(bupo), 2)
    changes = dict(max_steps=5, save_steps=2, save_total_limit=1, eval_steps=5, eval_samples=1, micro_batch_tokens=64)
    bupo.main(args_for(bupo, **changes))
    records = [record for record in read_jsonl("cut/metrics.jsonl") if "reward" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert json.loads(Path("cut/args.json").read_text())["max_steps"] == 5


def test_a_run_from_before_an_option_came_goes_on(args_for, whole):
    """A new option must not make strangers of all runs that lie on the users' disks."""
    interrupt(grpo, args_for(grpo), 2)
    saved = json.loads(Path("cut/args.json").read_text())
    del saved["delta"]
    Path("cut/args.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="--delta 5.0: the run in cut has 10.0"):
        grpo.main(args_for(grpo, delta=5.0))
    grpo.main(args_for(grpo))
    assert_same_run("cut", whole)


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "bupo", "opo", "ppo", "variants.dapo"])
def test_a_seed_repeats_a_run_and_another_does_not(name, args_for):
    """Without this nobody can tell a change from luck; and one seed for all runs would hide the luck."""
    script = importlib.import_module(name)
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        script.main(args_for(script, output_dir=folder, seed=seed, save_steps=0))
    assert_same_run("first", "again")
    weights, metrics, _ = learned("first")
    other_weights, other_metrics, _ = learned("other")
    assert weights != other_weights and metrics != other_metrics


def test_every_seed_and_every_step_draws_anew(args_for, data):
    """The same random numbers at every step, or for every seed: the same samples again, half the data for nothing."""
    same_problem = write_jsonl(Path("same.jsonl"), read_jsonl(data)[:1] * 12)  # or the order of problems would hide it
    still = dict(learning_rate=0.0, weight_decay=0.0, save_steps=0, eval_steps=0)
    texts = {}
    for seed in (0, 1):
        grpo.main(args_for(grpo, same_problem, seed=seed, output_dir=f"{seed}", **still))
        for answer in read_jsonl(f"{seed}/completions.jsonl"):
            texts.setdefault((seed, answer["step"]), []).append(answer["text"])
    assert len(texts) == len({tuple(answers) for answers in texts.values()}) == 8
