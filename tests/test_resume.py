"""Resuming: an interrupted run continues as if nothing had happened, bit for bit, or says why it cannot."""

import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, arguments, read_jsonl, write_jsonl
from safetensors.torch import load_file

import bookkeeping
import bupo
import common
import grpo
import sft

ALGORITHMS = [name for name in ("grpo", "bupo", "opo") if (ROOT / f"{name}.py").exists()]


def settings(script, model_folder, data, **options):
    """Four steps with unequal rewards in each; bupo changes phase after the second."""
    defaults = dict(max_steps=4, num_prompts=3, save_steps=1, save_total_limit=0, eval_steps=2)
    defaults |= {"internal_steps": 2} if script is bupo else {}
    return arguments(script, model_folder, data, **defaults | options)


def stop_after(step, monkeypatch):
    """Ctrl-C while this step is running."""
    real_save = bookkeeping.Run.save

    def save(run, current):
        if current == step:
            signal.raise_signal(signal.SIGINT)
        real_save(run, current)

    monkeypatch.setattr(bookkeeping.Run, "save", save)


def learned(folder):
    """Everything a run has learned and logged, without its clocks."""
    records = read_jsonl(Path(folder) / "metrics.jsonl")
    return (
        {name: tensor.numpy().tobytes() for name, tensor in load_file(Path(folder) / "model.safetensors").items()},
        [{name: value for name, value in record.items() if name not in common.VOLATILE} for record in records],
        read_jsonl(Path(folder) / "completions.jsonl"),
    )


def assert_same(folder, other):
    for ours, theirs in zip(learned(folder), learned(other), strict=True):
        assert ours == theirs


@pytest.mark.parametrize("name, stop", [(name, 2) for name in ALGORITHMS] + [("bupo", 1), ("bupo", 3)])
def test_resumed_run_is_the_uninterrupted_one(name, stop, model_folder, data, monkeypatch, capsys):
    """Lost moments, repeated problems, the wrong phase or other random numbers: a kink in every curve."""
    script = importlib.import_module(name)
    script.main(settings(script, model_folder, data, output_dir="whole"))
    with monkeypatch.context() as m:
        stop_after(stop, m)
        with pytest.raises(SystemExit) as end:
            script.main(settings(script, model_folder, data, output_dir="cut"))
    assert end.value.code == 130 and "resume" in capsys.readouterr().err.splitlines()[-1]
    assert bookkeeping.step_of(Path(f"cut/checkpoint-{stop}")) == stop and not Path("cut/model.safetensors").exists()
    script.main(settings(script, model_folder, data, output_dir="cut"))
    assert_same("cut", "whole")
    steps = [record["step"] for record in read_jsonl("cut/metrics.jsonl") if "reward" in record]
    assert steps == [1, 2, 3, 4]


def test_imitation_resumes_with_its_schedule(model_folder, data, monkeypatch):
    """A warm-up that starts again, or a decay counted from the restart, is another schedule."""
    trajectories = model_folder.parent / "trajectories.jsonl"
    sft.main(settings(sft, model_folder, trajectories, eval_data=str(data), output_dir="whole"))
    with monkeypatch.context() as m:
        stop_after(2, m)
        with pytest.raises(SystemExit):
            sft.main(settings(sft, model_folder, trajectories, eval_data=str(data), output_dir="cut"))
    sft.main(settings(sft, model_folder, trajectories, eval_data=str(data), output_dir="cut"))
    assert_same("cut", "whole")


def test_a_crash_loses_only_the_steps_since_the_checkpoint(model_folder, data, monkeypatch):
    """Steps logged after the last checkpoint are trained again: their lines must not stand in the log twice."""
    bupo.main(settings(bupo, model_folder, data, output_dir="whole"))
    real_save = bookkeeping.Run.save

    def save(run, step):
        if step == 3:
            raise MemoryError("the machine goes down after the log, before the checkpoint")
        real_save(run, step)

    with monkeypatch.context() as m:
        m.setattr(bookkeeping.Run, "save", save)
        with pytest.raises(MemoryError):
            bupo.main(settings(bupo, model_folder, data, output_dir="cut", save_steps=2))
    assert read_jsonl("cut/metrics.jsonl")[-1]["step"] == 3
    with open("cut/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rewa')  # and a line that was being written
    with open("cut/completions.jsonl", "ab") as file:
        file.write('{"step": 3, "text": "\u00fc'.encode()[:-1])  # cut inside a character
    bupo.main(settings(bupo, model_folder, data, output_dir="cut", save_steps=2))
    assert_same("cut", "whole")


def test_a_half_written_checkpoint_is_never_chosen(model_folder, data, monkeypatch):
    """Killed while it was saving: the newest folder is the broken one, and resuming from it fails or, worse, works."""
    grpo.main(settings(grpo, model_folder, data, output_dir="whole"))
    with monkeypatch.context() as m:
        stop_after(2, m)
        with pytest.raises(SystemExit):
            grpo.main(settings(grpo, model_folder, data, output_dir="cut"))
    shutil.copytree("cut/checkpoint-2", "cut/checkpoint-3.tmp")
    Path("cut/checkpoint-3.tmp/trainer_state.json").write_text('{"step": 3}')
    Path("cut/checkpoint-9").mkdir()
    (Path("cut/checkpoint-9") / "model.safetensors").write_bytes(b"half")
    grpo.main(settings(grpo, model_folder, data, output_dir="cut"))
    assert_same("cut", "whole")


def test_a_kill_while_saving_leaves_the_last_checkpoint_whole(model_folder, data, monkeypatch):
    """A checkpoint written in place of the previous one: a kill in between leaves none at all."""
    grpo.main(settings(grpo, model_folder, data, output_dir="whole"))
    real_save, saves = torch.save, []

    def save(*args, **kwargs):
        saves.append(args)
        if len(saves) == 3:
            raise KeyboardInterrupt  # in the middle of the third checkpoint, weights on disk, optimizer not
        real_save(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(torch, "save", save)
        with pytest.raises(KeyboardInterrupt):
            grpo.main(settings(grpo, model_folder, data, output_dir="cut", save_total_limit=1))
    grpo.main(settings(grpo, model_folder, data, output_dir="cut", save_total_limit=1))
    assert_same("cut", "whole")
    assert [path.name for path in Path("cut").glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_finished_run_says_so_in_one_line(model_folder, data, capsys, monkeypatch):
    """The same command twice must neither train again over the results nor end in an error."""
    grpo.main(settings(grpo, model_folder, data))
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        grpo.main(settings(grpo, model_folder, data))
    assert not end.value.code  # exit status 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 and "--overwrite" in said.out and not said.err
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


def test_more_steps_continue_a_finished_run(model_folder, data):
    """--max_steps raised afterwards gives the run that was long from the start."""
    for steps in (2, 4):
        grpo.main(settings(grpo, model_folder, data, max_steps=steps, save_steps=0, output_dir="grown"))
    grpo.main(settings(grpo, model_folder, data, save_steps=0, output_dir="whole"))
    assert_same("grown", "whole")


def test_fewer_steps_than_trained_are_not_claimed(model_folder, data, monkeypatch):
    """--max_steps lowered below the checkpoint: under the lower number, the steps beyond would be trained twice."""
    grpo.main(settings(grpo, model_folder, data, output_dir="whole"))
    with monkeypatch.context() as m:
        stop_after(3, m)
        with pytest.raises(SystemExit):
            grpo.main(settings(grpo, model_folder, data, output_dir="cut"))
    grpo.main(settings(grpo, model_folder, data, output_dir="cut", max_steps=2))
    assert bookkeeping.step_of(Path("cut")) == 3
    grpo.main(settings(grpo, model_folder, data, output_dir="cut"))
    assert_same("cut", "whole")


def test_overwrite_trains_again(model_folder, data):
    """Leftovers of the run before, a checkpoint say, must not find their way into the new one."""
    grpo.main(settings(grpo, model_folder, data, output_dir="whole"))
    grpo.main(settings(grpo, model_folder, data, seed=5, max_steps=6))
    grpo.main(settings(grpo, model_folder, data, overwrite=True))
    assert_same("run", "whole")
    assert sorted(path.name for path in Path("run").glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    "name, value",
    [("learning_rate", 5e-4), ("seed", 1), ("num_prompts", 4), ("internal_steps", 3), ("temperature", 0.9)],
)
def test_another_option_is_another_run(name, value, model_folder, data, monkeypatch):
    """Half a run at one learning rate and half at another, under one name: say which option differs, touch nothing."""
    with monkeypatch.context() as m:
        stop_after(2, m)
        with pytest.raises(SystemExit):
            bupo.main(settings(bupo, model_folder, data))
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    with pytest.raises(common.UserError, match=f"--{name} {value}"):
        bupo.main(settings(bupo, model_folder, data, **{name: value}))
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_bookkeeping_options_may_change(model_folder, data, monkeypatch):
    """More steps, other evaluations, a smaller memory: none of them makes it another experiment."""
    with monkeypatch.context() as m:
        stop_after(2, m)
        with pytest.raises(SystemExit):
            bupo.main(settings(bupo, model_folder, data))
    changes = dict(max_steps=5, save_steps=2, save_total_limit=1, eval_steps=5, eval_samples=1, micro_batch_tokens=64)
    bupo.main(settings(bupo, model_folder, data, **changes))
    records = [record for record in read_jsonl("run/metrics.jsonl") if "reward" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert json.loads(Path("run/args.json").read_text())["max_steps"] == 5


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_seed_repeats_a_run_and_another_does_not(name, model_folder, data):
    """Without this nobody can tell a change from luck; and one seed for all runs would hide the luck."""
    script = importlib.import_module(name)
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        script.main(settings(script, model_folder, data, output_dir=folder, seed=seed, save_steps=0))
    assert_same("first", "again")
    assert learned("first")[1] != learned("other")[1] and learned("first")[0] != learned("other")[0]


def test_every_seed_and_every_step_draws_anew(model_folder, data):
    """The same random numbers at every step, or for every seed: the same samples again, and half the data for nothing."""
    same_problem = write_jsonl(Path("same.jsonl"), read_jsonl(data)[:1] * 12)  # or the order of problems would hide it
    texts = {}
    for seed in (0, 1):
        still = dict(learning_rate=0.0, weight_decay=0.0, save_steps=0, eval_steps=0)
        grpo.main(settings(grpo, model_folder, same_problem, seed=seed, output_dir=f"{seed}", **still))
        for answer in read_jsonl(f"{seed}/completions.jsonl"):
            texts.setdefault((seed, answer["step"]), []).append(answer["text"])
    assert len(texts) == len({tuple(answers) for answers in texts.values()}) == 8


def test_checkpoints_beyond_the_limit_go(model_folder, data):
    """Sixteen bytes a parameter and checkpoint: without a limit a long run fills the disk and dies saving."""
    grpo.main(settings(grpo, model_folder, data, save_total_limit=2))
    assert sorted(path.name for path in Path("run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def train(options):
    """Run in a process of its own, to be killed."""
    bookkeeping.draw_curves = lambda folder: None
    bupo.main(options)


def process(options):
    """`train` in a process that starts within milliseconds: a fork, or where that could hold a GPU, one of a server's."""
    context = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")
    started = context.Process(target=train, args=(options,))
    started.start()
    return started


def saving(folder, seconds):
    """Wait until a checkpoint is being written, at most so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not list(Path(folder).glob("*.tmp/*")):
        time.sleep(0.0005)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment(kills, model_folder, data):
    """SIGKILL at random moments of twelve steps, in both phases, and while a checkpoint is being written: after the
    last start weights, metrics and answers are those of the run that nobody touched."""

    def start(folder):
        options = dict(max_steps=12, internal_steps=6, num_prompts=3, eval_steps=8, save_total_limit=2)
        return process(settings(bupo, model_folder, data, output_dir=str(folder), **options))

    begin = time.monotonic()
    start("whole").join()
    duration, generator = time.monotonic() - begin, random.Random(kills)
    for kill in range(kills):
        victim = start(f"cut{kill}")
        time.sleep(generator.uniform(0, duration))
        if kill % 2:
            saving(f"cut{kill}", duration)
        victim.kill()
        victim.join()
        second = start(f"cut{kill}")
        second.join()
        assert second.exitcode == 0
        assert_same(f"cut{kill}", "whole")
        assert not list(Path(f"cut{kill}").glob("*.tmp"))


@pytest.mark.parametrize("room", [1000, 200_000])
def test_a_full_disk_costs_no_checkpoint(room, model_folder, data, monkeypatch, capsys):
    """No file may grow beyond `room` bytes: the new checkpoint fails in its weights or in its optimizer; the old one
    must stay, nothing half-written may, and the user reads one line."""
    grpo.main(settings(grpo, model_folder, data, output_dir="whole"))
    with monkeypatch.context() as m:
        stop_after(2, m)
        with pytest.raises(SystemExit):
            grpo.main(settings(grpo, model_folder, data, output_dir="cut"))
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    logs = max(Path(f"cut/{name}.jsonl").stat().st_size for name in ("metrics", "completions"))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(room, 4 * logs), hard))
        with pytest.raises(SystemExit) as end, common.one_line_errors():
            grpo.main(settings(grpo, model_folder, data, output_dir="cut"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert end.value.code == 2 and "cannot be written" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in Path("cut").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    grpo.main(settings(grpo, model_folder, data, output_dir="cut"))
    assert_same("cut", "whole")


def test_a_full_disk_while_logging_is_one_line(capsys):
    """The log is written at every step: mostly it, not the checkpoint, meets the full disk first."""
    with pytest.raises(SystemExit) as end, common.one_line_errors():
        bookkeeping.append_jsonl("/dev/full", [{"step": 1}])
    assert end.value.code == 2 and "No space left" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named(name, model_folder, data, monkeypatch):
    """Bytes that rotted, or a copy that stopped: the file at fault and what to do, no traceback, nothing deleted."""
    with monkeypatch.context() as m:
        stop_after(2, m)
        with pytest.raises(SystemExit):
            grpo.main(settings(grpo, model_folder, data))
    path = Path(f"run/checkpoint-2/{name}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(common.UserError, match=f"checkpoint-2/{name}: cannot be read"):
        grpo.main(settings(grpo, model_folder, data))
    assert path.exists()


def test_a_second_signal_stops_at_once(model_folder, data, monkeypatch):
    """A step of a large model takes minutes: who presses Ctrl-C twice does not want to wait for it."""
    real_sample = common.sample

    def sample(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        return real_sample(*args, **kwargs)

    monkeypatch.setattr(common, "sample", sample)
    with pytest.raises(SystemExit) as end:
        grpo.main(settings(grpo, model_folder, data, eval_steps=0))
    assert end.value.code == 143 and not list(Path("run").glob("checkpoint-*"))


def test_a_signal_while_the_final_model_is_written_does_not_cut_it(model_folder, data, monkeypatch):
    """The last step is done and its model is being written: a signal now must not lose it."""
    real_rename = os.rename

    def rename(source, target):
        if Path(target).name == "final":
            signal.raise_signal(signal.SIGTERM)
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    grpo.main(settings(grpo, model_folder, data, save_steps=0))
    assert bookkeeping.step_of(Path("run")) == 4


def test_extending_a_finished_run_keeps_it_until_the_new_one_is_whole(model_folder, data, monkeypatch):
    """A finished run without checkpoints is its own checkpoint: dropped at the start, a kill loses everything."""
    grpo.main(settings(grpo, model_folder, data, max_steps=2, save_steps=0, output_dir="cut"))
    with monkeypatch.context() as m:
        m.setattr(common, "grade_rollouts", lambda *a: 1 / 0)  # dies in step 3
        with pytest.raises(ZeroDivisionError):
            grpo.main(settings(grpo, model_folder, data, max_steps=4, save_steps=0, output_dir="cut"))
    grpo.main(settings(grpo, model_folder, data, max_steps=4, save_steps=0, output_dir="cut"))
    grpo.main(settings(grpo, model_folder, data, max_steps=4, save_steps=0, output_dir="whole"))
    assert read_jsonl("cut/completions.jsonl") == read_jsonl("whole/completions.jsonl")


def test_foreign_checkpoints_are_not_deleted(model_folder, data):
    """Another program's checkpoint in --output_dir is somebody's work: only --overwrite may remove it."""
    Path("run/checkpoint-500").mkdir(parents=True)
    Path("run/checkpoint-500/trainer_state.json").write_text('{"global_step": 500}')
    with pytest.raises(common.UserError, match="checkpoint-500.*--overwrite"):
        grpo.main(settings(grpo, model_folder, data))
    assert Path("run/checkpoint-500").exists()


def test_a_tokenizer_with_several_templates_is_saved(model_folder, data):
    """Some tokenizers save a folder of further chat templates: found at the end of a run, it would lose the run."""
    folder = Path("several")
    shutil.copytree(model_folder, folder)
    tokenizer = common.load_model(str(folder))[1]
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    tokenizer.save_pretrained(folder)
    for max_steps in (1, 2):  # the second time the folder is there already
        grpo.main(settings(grpo, folder, data, max_steps=max_steps, eval_steps=0))
    assert [path.name for path in Path("run").iterdir() if path.is_dir() and "template" in path.name]
