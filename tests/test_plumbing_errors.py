"""What a user sees when something ends early: one line for an error, one for Ctrl-C, and work that goes on when nobody
looks any more."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, arguments, read_jsonl

import analyze_entropy
import bookkeeping
import common
import evaluate
import grpo
from plumbing import verifier
from plumbing.errors import PatientStream, UserError, one_line_errors, printable


def training(model_folder, data, **options):
    """The command line of a short run of grpo.py, with the python that runs it."""
    words = [sys.executable, str(ROOT / "grpo.py")]
    for name, value in (vars(arguments(grpo, model_folder, data, eval_steps=1, **options))).items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words


def test_a_reader_who_leaves_does_not_end_a_run(model_folder, data):
    """`python grpo.py | head -1` died in the middle of training: BrokenPipeError."""
    command = training(model_folder, data)
    reader = ["head", "-1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        subprocess.run(reader, stdin=run.stdout, stdout=subprocess.DEVNULL)
        run.stdout.close()
        _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert "Error" not in said
    assert os.path.exists("run/model.safetensors")


@pytest.mark.parametrize("device", ["/dev/full", "closed pipe"])
def test_a_stream_that_goes_away_is_given_up(device):
    """From then on writing costs nothing and raises nothing, not even when Python ends and flushes it."""
    if device == "/dev/full":
        file = open(device, "w")
    else:
        reader, writer = os.pipe()
        os.close(reader)
        file = os.fdopen(writer, "w")
    stream = PatientStream(file)
    for _ in range(3):
        stream.write("x" * 100_000)
        stream.flush()
    file.close()


@pytest.mark.parametrize("text, shown", [("±", b"?"), ("\ud800", b"?"), ("a", b"a")])
def test_a_character_that_cannot_be_shown_is_replaced(text, shown, tmp_path):
    with open(tmp_path / "screen", "w", encoding="ascii") as file:
        PatientStream(file).write(text)
    assert (tmp_path / "screen").read_bytes() == shown


@pytest.mark.slow
def test_a_full_stdout_is_not_a_full_disk(model_folder, data):
    """It was blamed on --output_dir, which has all the room it needs."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(training(model_folder, data), stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert os.path.exists("run/model.safetensors")


@pytest.mark.slow
def test_a_screen_without_the_sign_costs_no_results(world):
    """The sign ± in the table ended evaluate.py on an ASCII terminal: after hours, before any result was written."""
    words = [sys.executable, str(ROOT / "evaluate.py"), str(world / "base"), "--data", str(world / "held_out.jsonl")]
    words += ["--num_samples", "2", "--max_completion_length", "8", "--output_dir", "out"]
    surroundings = dict(os.environ, PYTHONIOENCODING="ascii", LC_ALL="C")
    done = subprocess.run(words, env=surroundings, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert os.path.exists("out/results.json") and b"?" in done.stdout


@pytest.mark.parametrize(
    "text, shown", [("a\nb\tc", "a b c"), ("\x1b[2Jgone", "\\x1b[2Jgone"), ("±", "±"), ("\ud800", "\\ud800")]
)
def test_an_error_is_one_line_that_moves_no_cursor(text, shown, capsys):
    """A field name or a template may hold a terminal's commands: shown raw, it clears the screen, or worse."""
    assert printable(text) == shown
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError(f"{text}: wrong")
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "a"), IsADirectoryError(21, "Is one", "a")])
def test_what_may_not_be_opened_is_one_line(error, capsys):
    """A folder in place of a file, or a file of somebody else, ended in a traceback."""
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code == 2 and capsys.readouterr().err.startswith(f"error: a: {error.strerror}; ")


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("script", ["evaluate", "analyze_entropy"])
def test_ctrl_c_is_one_line(script, world, monkeypatch, capsys):
    """Seventy lines of traceback for a decision that the user made himself."""
    monkeypatch.setattr(common, "sample", interrupted)
    with pytest.raises(SystemExit) as end, one_line_errors():
        words = [str(world / "base"), "--data", str(world / "held_out.jsonl")]
        if script == "evaluate":
            evaluate.main(evaluate.parse(words))
        else:
            analyze_entropy.main(analyze_entropy.parse(words))
    assert end.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_stops_at_once(number, model_folder, data, monkeypatch, capsys):
    """The first evaluation takes half a minute, and there is nothing to save yet."""
    evaluated = []

    def evaluate_and_signal(*args, **kwargs):
        evaluated.append(1)
        signal.raise_signal(number)

    monkeypatch.setattr(common, "evaluate", evaluate_and_signal)
    with pytest.raises(SystemExit) as end:
        grpo.main(arguments(grpo, model_folder, data, eval_steps=1))
    assert end.value.code == 128 + number and evaluated == [1]
    assert "stopped at once; before any step" in capsys.readouterr().err
    assert read_jsonl("run/metrics.jsonl") == []


def test_a_closed_terminal_saves_a_checkpoint(model_folder, data, monkeypatch):
    """A lost connection ended a night's run without a checkpoint."""
    real_save = bookkeeping.Run.save

    def save(run, step):
        signal.raise_signal(signal.SIGHUP)
        real_save(run, step)

    monkeypatch.setattr(bookkeeping.Run, "save", save)
    with pytest.raises(SystemExit) as end:
        grpo.main(arguments(grpo, model_folder, data))
    assert end.value.code == 129
    assert os.path.exists("run/checkpoint-1/trainer_state.json")


def test_training_that_diverges_is_one_line(model_folder, data, capsys):
    """'probability tensor contains either `inf`, `nan` or element < 0' names neither the cause nor the remedy."""
    with pytest.raises(SystemExit) as end, one_line_errors():
        grpo.main(arguments(grpo, model_folder, data, learning_rate=1e30**0.3, max_steps=20, num_prompts=4))
    assert end.value.code == 2
    assert "lower --learning_rate" in capsys.readouterr().err.splitlines()[-1]


def test_evaluation_without_verdicts_stops(world, monkeypatch):
    """A broken verifier gave every model 0.000, with exit status 0."""
    monkeypatch.setattr(verifier, "compare", lambda pairs, timeout=3.0: ["error"] * len(pairs))
    monkeypatch.setattr(verifier.SHARED, "last_error", "RuntimeError: no parser")
    words = [str(world / "base"), "--data", str(world / "held_out.jsonl"), "--output_dir", "out"]
    with pytest.raises(UserError, match="base on .*no verdict on too many of .* error .RuntimeError: no parser"):
        evaluate.main(evaluate.parse(words))
    with pytest.raises(UserError, match="no verdict on too many"):
        evaluate.main(evaluate.parse([*words, "--rescore"]))


def test_ungraded_answers_are_in_the_table(world, monkeypatch, capsys):
    """No verdict must not look like a wrong answer."""
    monkeypatch.setattr(verifier, "compare", lambda pairs, timeout=3.0: ["timeout"] * len(pairs))
    monkeypatch.setattr(evaluate, "draw_panels", lambda *args, **kwargs: None)
    words = [str(world / "base"), "--data", str(world / "held_out.jsonl"), "--max_grader_errors", "1"]
    evaluate.main(evaluate.parse([*words, "--num_samples", "4", "--output_dir", "out"]))
    table = capsys.readouterr().out
    assert "ungraded" in table


def test_an_evaluation_in_training_without_verdicts_stops(model_folder, data, monkeypatch):
    """Its curve fell to 0, and nothing said that it was the verifier's."""
    monkeypatch.setattr(verifier, "compare", lambda pairs, timeout=3.0: ["timeout"] * len(pairs))
    with pytest.raises(UserError, match="evaluation at step 0: no verdict on too many"):
        grpo.main(arguments(grpo, model_folder, data, eval_steps=1))
