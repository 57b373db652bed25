"""Scripts as users meet them: one real command of each, what it leaves behind, and what --help says."""

import importlib
import json
import runpy
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, arguments, command_line, read_jsonl, run_script, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import bookkeeping
import common
import evaluate
import grpo
import sft
from tasks import arithmetic
from tasks.answers import last_boxed

ALGORITHMS = ["grpo.py", "bupo.py", "opo.py", "em.py", "ppo.py"]
SCRIPTS = ["sft.py", *ALGORITHMS]
PROMPTS = {"sft.py": 12, "em.py": 1, "grpo.py": 6, "bupo.py": 6, "opo.py": 6, "ppo.py": 6}

RECORD = (
    "step phase reward accuracy response_length entropy trained_entropy grad_norm zero_variance_share truncated_share "
    "logp_gap tokens_per_second seconds seconds_by_stage peak_memory_gb"
)
ANSWER = "step problem text answer reward advantage length finished"


def module(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def weights(folder):
    """The tensors of a model folder, loaded as anybody would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# What a command leaves behind
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands(request, model_folder, data, tmp_path_factory):
    """A two-step command of every script that is asked for: script -> (its folder, its end as a future).

    Two at a time, since each takes seconds to start.
    """
    rows = [{"problem": row["problem"], "response": f"\\boxed{{{row['answer']}}}"} for row in read_jsonl(data)]
    trajectories = write_jsonl(tmp_path_factory.mktemp("data") / "trajectories.jsonl", rows)
    wanted = [item.name for item in request.session.items if "commands" in item.fixturenames]
    started = {}
    with ThreadPoolExecutor(2) as pool:
        for script in SCRIPTS:
            if not any(script in name for name in wanted):
                continue
            settings = SMALL | dict(num_prompts=PROMPTS[script], save_steps=1, eval_steps=1)
            source = trajectories if script == "sft.py" else data
            settings |= dict(model=model_folder, data=source, eval_data=data, output_dir="run")
            fields = module(script).Args.__dataclass_fields__
            options = command_line(**{name: value for name, value in settings.items() if name in fields})
            folder = tmp_path_factory.mktemp("command")
            started[script] = folder, pool.submit(run_script, script, *options, folder=folder)
        yield started


@pytest.fixture
def script(request, commands, monkeypatch):
    """A script whose command has ended well; the current folder is the one where it ran."""
    folder, end = commands[request.param]
    assert end.result().returncode == 0, end.result().stderr
    monkeypatch.chdir(folder)
    return request.param


EVERY_ALGORITHM = pytest.mark.parametrize("script", ALGORITHMS, indirect=True)


def steps():
    return [record for record in read_jsonl("run/metrics.jsonl") if "reward" in record]


@EVERY_ALGORITHM
def test_every_step_is_logged(script):
    """A metric under another name, or one that is missing in one script, breaks every comparison of scripts."""
    assert json.loads(Path("run/args.json").read_text())["max_steps"] == 2
    assert [record["step"] for record in steps()] == [1, 2]
    for record in steps():
        assert set(RECORD.split()) <= set(record)
        internal = script == "bupo.py" and record["step"] == 1
        assert record["phase"] == ("internal" if internal else "whole")
        assert record["logp_gap"] is None if internal else record["logp_gap"] < 1e-5
        assert record["grad_norm"] > 0 and record["entropy"] > 0 and record["trained_entropy"] > 0
        assert abs(record["seconds"] - sum(record["seconds_by_stage"].values())) < 1e-6


@EVERY_ALGORITHM
def test_every_evaluation_is_logged(script):
    """A curve without its start, or a KL to another model than the one that training began with."""
    start, *others = [record for record in read_jsonl("run/metrics.jsonl") if "eval_accuracy" in record]
    assert [record["step"] for record in (start, *others)] == [0, 1, 2]
    assert start["kl_to_start"] == 0 and all(record["kl_to_start"] > 0 for record in others)
    assert all(0 <= record["eval_greedy_accuracy"] <= 1 for record in (start, *others))


@EVERY_ALGORITHM
def test_every_answer_is_logged(script):
    """Who wants to know why the reward rises reads the answers: all of them, with what they were paid."""
    answers = read_jsonl("run/completions.jsonl")
    assert len(answers) == 2 * 4 * PROMPTS[script]
    for answer in answers:
        assert set(ANSWER.split()) <= set(answer)
        assert answer["answer"] == last_boxed(answer["text"])
    for record in steps():
        own = [answer["reward"] for answer in answers if answer["step"] == record["step"]]
        assert record["reward"] == pytest.approx(sum(own) / len(own))


@EVERY_ALGORITHM
def test_every_model_is_trained_and_can_be_loaded(script, model_folder):
    """Scripts break at the seams: weights that did not move, a checkpoint that nothing else can load."""
    start, first, final = (weights(folder) for folder in (model_folder, "run/checkpoint-1", "run"))
    assert not same(start, first) and not same(first, final)
    for folder in ("run/checkpoint-1", "run"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False) == "<|user|>1"
        assert json.loads(Path(folder, "config.json").read_text())["embedded"] is True


@EVERY_ALGORITHM
def test_nothing_else_is_left(script):
    assert Path("run/curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in Path().iterdir()] == ["run"]
    assert not list(Path("run").glob("*.tmp"))


@pytest.mark.parametrize("script", ["sft.py"], indirect=True)
def test_imitation_leaves_everything_behind(script, model_folder, data):
    """The one script without rewards: it must learn from trajectories, and leave a model the others can start from."""
    first, second = [record for record in read_jsonl("run/metrics.jsonl") if "loss" in record]
    assert (first["step"], second["step"]) == (1, 2)
    assert second["loss"] < first["loss"]  # the same twelve trajectories twice
    assert {"grad_norm", "seconds", "peak_memory_gb"} <= set(first)
    assert not same(weights(model_folder), weights("run/checkpoint-1"))
    AutoTokenizer.from_pretrained("run")
    grpo.main(arguments(grpo, "run", data, output_dir="next", max_steps=1))


# ---------------------------------------------------------------------------------------------------------------------
# The embedded model
# ---------------------------------------------------------------------------------------------------------------------


def test_the_embedded_model_is_built_once(monkeypatch, capsys):
    """`python grpo.py` with nothing at hand builds its model, or finishes one that was interrupted; then it is kept."""
    real_problems = arithmetic.problems
    monkeypatch.setattr(arithmetic, "problems", lambda name, split, n: real_problems(name, split, min(n, 40)))
    monkeypatch.setattr(sft, "EMBEDDED", sft.EMBEDDED | dict(max_steps=3, num_prompts=4, save_steps=1))
    real_save = bookkeeping.Run.save
    saved = []

    def save(run, step):
        saved.append(step)
        if saved == [1, 2]:
            run.stop_signal = signal.SIGINT
        real_save(run, step)

    monkeypatch.setattr(bookkeeping.Run, "save", save)

    def train(folder):
        args = arguments(grpo, "embedded", "arithmetic", eval_data="", output_dir=folder)
        grpo.main(args)

    with pytest.raises(SystemExit):
        train("one")
    assert not Path("one").exists()
    train("one")
    assert saved == [1, 2, 3, 1, 2]  # built in 2 + 1 steps, then trained in 2
    built = Path("runs/tiny/model.safetensors").stat().st_mtime_ns
    train("two")
    assert Path("runs/tiny/model.safetensors").stat().st_mtime_ns == built
    said = capsys.readouterr().out
    assert said.count(f"it will lie in {Path('runs/tiny').absolute()}") == 2  # it was interrupted
    assert Path("two/model.safetensors").exists()


@pytest.mark.slow
def test_nothing_but_python_learns_something():
    """The first command of the README, in an empty folder: the model is built, trained, and better afterwards."""
    done = run_script("grpo.py", timeout=3600)
    assert done.returncode == 0, done.stderr
    accuracy = [r["eval_accuracy"] for r in read_jsonl("runs/grpo/metrics.jsonl") if "eval_accuracy" in r]
    assert accuracy[0] < 0.5 and accuracy[-1] > accuracy[0] + 0.2


# ---------------------------------------------------------------------------------------------------------------------
# --help
# ---------------------------------------------------------------------------------------------------------------------


def help_of(command, monkeypatch, capsys):
    """What `python command --help` prints, its lines joined; it must end with status 0."""
    script, *words = command.split()
    monkeypatch.setattr(sys, "argv", [script, *words, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not end.value.code
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("script", [*SCRIPTS, "variants/cispo.py", "variants/dapo.py", "variants/gspo.py"])
def test_help_describes_every_option(script, monkeypatch, capsys):
    """A literal % in one help text breaks --help as a whole; an option without help or default is a riddle."""
    text = help_of(script, monkeypatch, capsys)
    for name, field in module(script).Args.__dataclass_fields__.items():
        assert f"--{name}" in text
        assert len(field.metadata["help"]) > 10
    for value in (module(script).EMBEDDED["learning_rate"], module(script).Args().weight_decay):
        assert f"(default: {value})" in text  # the embedded model's where it has its own


@pytest.mark.parametrize(
    "command",
    [
        "evaluate.py",
        "report.py",
        "analyze_entropy.py",
        "analyze_lens.py",
        "analyze_patching.py",
        "analyze_alignment.py",
        "analyze_logits.py",
        "analyze_gradients.py",
        "analyze_trajectory.py",
        "analyze_trajectory.py descent",
        "analyze_trajectory.py landscape",
        "analyze_trajectory.py prune",
        "analyze_trajectory.py behaviours",
    ],
)
def test_help_needs_nothing_else(command, monkeypatch, capsys):
    """Who asks for help has no model, problems or run to name yet."""
    assert help_of(command, monkeypatch, capsys).startswith(f"usage: {command}")


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C
# ---------------------------------------------------------------------------------------------------------------------


def interrupted(*args, **settings):
    """In place of common.sample: somebody presses Ctrl-C while it works."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "command",
    [
        "evaluate.py",
        "analyze_entropy.py",
        "analyze_trajectory.py descent",
        "analyze_trajectory.py landscape",
        "analyze_trajectory.py prune",
    ],
)
def test_ctrl_c_while_sampling_is_one_line(command, model_folder, data, monkeypatch, capsys):
    """Forty lines of traceback, of which the last is the news."""
    script, *words = command.split()
    words += [str(model_folder), "--data", str(data), "--output_dir", "out"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(common, "sample", interrupted)
        patch.setattr(sys, "argv", [script, *words])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 130
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said.err
    assert not list(Path("out").glob("*.json"))


def test_an_evaluation_goes_on_after_ctrl_c(model_folder, data, monkeypatch):
    """What it leaves behind, a sample file with nothing but its header, must not be in the way."""
    words = [str(model_folder), "--data", str(data), "--output_dir", "out", "--num_samples", "2", "--num_problems", "2"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "sample", interrupted)
        evaluate.main(evaluate.parse(words))
    evaluate.main(evaluate.parse(words))
    assert json.loads(Path("out/results.json").read_text())["results"][0]["problems"] == 2
