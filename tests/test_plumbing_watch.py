"""Several processes end together, and one line says why: whatever goes wrong, wherever, nobody waits for ever."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from helpers import ROOT, arguments, assert_same_run, command_line, run_script

import bupo
import common
import grpo
import sft
from plumbing import figures
from plumbing.errors import UserError
from plumbing.options import EMBEDDED_MODEL
from plumbing.runs import step_of

STEPS = dict(num_prompts=6, save_steps=1, save_total_limit=0, eval_steps=0)


def run(count, work):
    """`count` processes call work(rank) -> their exit statuses, and what each has printed."""
    found = processes.statuses(processes.started(count, work))
    return found, [Path(f"out-{rank}").read_text() for rank in range(count)]


def errors_in(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


# Bad input ------------------------------------------------------------------------------------------------------------

WRONG = {
    "num_prompts_uneven": (dict(num_prompts=7), "--num_prompts 7: 2 processes cannot share them evenly; start a "),
    "num_prompts_few": (dict(num_prompts=1), "--num_prompts 1: too few for 2 processes; raise it, or start 1 at most"),
    "optimizer_device": (dict(optimizer_device="cpu"), "--optimizer_device cpu: is for one process; leave it out"),
    "device": (dict(device="cuda:1"), "--device cuda:1: is for one process; pass cuda, and each takes a GPU"),
    "model": (dict(model="nowhere"), "--model nowhere: cannot be loaded"),
}


@pytest.mark.parametrize("wrong, line", WRONG.values(), ids=WRONG)
def test_a_wrong_option_is_one_line_from_the_first(wrong, line, model_folder, data):
    """Eight processes, eight lines; or one that has ended while seven wait for it."""
    statuses, printed = run(2, lambda rank: grpo.main(arguments(grpo, model_folder, data, **STEPS | wrong)))
    assert statuses == [2, 2]
    [error] = errors_in(printed[0])
    assert error.startswith(f"error: {line}")
    assert printed[1] == ""


def test_what_divides_the_prompts_is_said(model_folder, data):
    """'Not divisible' leaves the arithmetic to the reader."""
    _, printed = run(2, lambda rank: grpo.main(arguments(grpo, model_folder, data, **STEPS | dict(num_prompts=9))))
    assert "(1, 3, 9), or take a multiple of 2" in printed[0]


def test_processes_with_different_options_are_refused(model_folder, data):
    """On two machines two commands are typed. Another seed on one of them trains on samples that nobody drew."""
    statuses, printed = run(2, lambda rank: grpo.main(arguments(grpo, model_folder, data, seed=rank, **STEPS)))
    assert statuses == [2, 2]
    assert errors_in(printed[0]) == ["error: --seed 0: process 1 has 1; start all of them by the same command"]
    assert printed[1] == ""


def test_an_error_of_one_process_ends_all_and_names_it(monkeypatch, model_folder, data):
    """One GPU runs out of memory: the others would wait for its gradients until somebody looks."""

    def work(rank):
        if rank == 1:
            monkeypatch.setattr(common, "sample", fail)
        grpo.main(arguments(grpo, model_folder, data, **STEPS))

    def fail(*args, **kwargs):
        raise UserError("out of GPU memory while sampling: repeat the command with a lower --max_rollout_tokens")

    statuses, printed = run(2, work)
    assert statuses == [2, 2]
    [error] = errors_in(printed[0])
    assert error.startswith("error: process 1: out of GPU memory while sampling")


# One for all ----------------------------------------------------------------------------------------------------------


def test_the_embedded_model_is_built_once(monkeypatch):
    """Each of them building it in the same folder at the same time: half of one model and half of another."""
    monkeypatch.setitem(sft.EMBEDDED, "max_steps", 2)

    def work(rank):
        sft.ensure_embedded()
        print("from here on there is one")
        assert step_of(EMBEDDED_MODEL) == 2

    statuses, printed = run(2, work)
    assert statuses == [0, 0], printed
    assert "building the embedded model" in printed[0]
    assert printed[0].endswith("from here on there is one\n") and printed[1] == ""


# Death ----------------------------------------------------------------------------------------------------------------


def die_in(moment, step):
    """Replace what is called at a moment by one that is killed there in its call number `step`."""
    module, name = {
        "sampling": (common, "sample_wave"),
        "backward": (torch.Tensor, "backward"),
        "saving": (torch, "save"),
    }[moment]
    real = getattr(module, name)
    calls = []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, name, deadly)


DEATHS = [
    (1, "backward", 3),
    (0, "backward", 3),
    pytest.param(1, "sampling", 2, marks=pytest.mark.slow),
    pytest.param(2, "saving", 2, marks=pytest.mark.slow),
    pytest.param(0, "saving", 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("victim, moment, call", DEATHS)
def test_a_killed_process_ends_the_run_and_a_second_start_resumes(victim, moment, call, model_folder, data):
    """Killed because a machine's memory was full: seven GPUs wait and are paid for, and nothing says for whom."""
    figures.draw_curves = lambda folder: None  # in the forks; the fixture of all tests does it here

    def train(rank, output_dir="cut"):
        steps = dict(max_steps=4, internal_steps=2, output_dir=output_dir)
        bupo.main(arguments(bupo, model_folder, data, **STEPS | steps))

    def train_and_die(rank):
        if rank == victim:
            die_in(moment, call)
        train(rank)

    begin = time.monotonic()
    statuses, printed = run(3, train_and_die)
    assert time.monotonic() - begin < 60
    assert statuses == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)]
    speaker = 1 if victim == 0 else 0
    lines = [errors_in(text) for text in printed]
    [line] = lines.pop(speaker)
    assert line == f"error: process {victim} has died; the same command goes on from the last checkpoint"
    assert lines == [[], []]
    assert run(3, train)[0] == [0, 0, 0]
    assert run(3, lambda rank: train(rank, "whole"))[0] == [0, 0, 0]
    assert_same_run("cut", "whole")
    assert not list(Path("cut").glob("*.tmp"))


# torchrun -------------------------------------------------------------------------------------------------------------


def torchrun(*options, script="grpo.py", count=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), str(ROOT / script)]
    return [*command, *map(str, options)]


@pytest.fixture
def options(model_folder, data):
    """Command line of a short run."""
    given = dict(model=model_folder, data=data, eval_data=data, num_prompts=6, num_generations=4, num_minibatches=1)
    given |= dict(max_completion_length=10, learning_rate=1e-3, eval_steps=0, save_steps=0, max_steps=3)
    return given


@pytest.mark.slow
def test_torchrun_is_what_one_process_does(options):
    """Forks are not what users start: the real command, its files, and what it shows."""
    one = run_script("grpo.py", *command_line(**options, output_dir="one"))
    done = subprocess.run(torchrun(*command_line(**options, output_dir="two")), capture_output=True, text=True)
    assert (one.returncode, done.returncode) == (0, 0), one.stderr + done.stderr
    assert done.stdout.replace("two", "one").splitlines()[:1] == one.stdout.splitlines()[:1]
    assert done.stdout.count("the first problem") == 1
    ours = [json.loads(line)["text"] for line in Path("two/completions.jsonl").read_text().splitlines()]
    theirs = [json.loads(line)["text"] for line in Path("one/completions.jsonl").read_text().splitlines()]
    assert ours == theirs and len(ours) == 72


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes(options):
    """torchrun passes Ctrl-C on, to one process after the other: all must stop after the same step."""
    options |= dict(max_steps=40)
    subprocess.run(torchrun(*command_line(**options, output_dir="whole")), capture_output=True, check=True)
    command = torchrun(*command_line(**options, output_dir="cut"))
    started = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    log = Path("cut/metrics.jsonl")
    while not log.is_file() or log.read_text().count("\n") < 3:
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert said.count("stopped after step") == said.count("stopping after this step") == 1
    subprocess.run(command, capture_output=True, check=True)
    assert_same_run("cut", "whole")
