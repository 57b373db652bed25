"""The first second of a script: help without libraries, and Ctrl-C while they load."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, run_script

from plumbing import start

TRAINING = ["grpo.py", "bupo.py", "opo.py", "em.py", "ppo.py", "sft.py"]
VARIANTS = ["variants/cispo.py", "variants/dapo.py", "variants/gspo.py"]
OTHERS = ["evaluate.py", "analyze_entropy.py", "analyze_logits.py", "analyze_gradients.py", "analyze_trajectory.py"]
OTHERS += ["analyze_lens.py", "analyze_patching.py", "analyze_alignment.py", "report.py"]


@pytest.mark.parametrize("script", TRAINING + VARIANTS + OTHERS)
def test_help_loads_no_library(script, monkeypatch, capsys):
    """Seven seconds for a list of options, because torch and transformers are loaded for it."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    for name in ("torch", "transformers", "common", "bookkeeping"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error
    with pytest.raises(SystemExit) as end:
        start.answer_help(ROOT / script)
    assert not end.value.code
    assert capsys.readouterr().out.startswith(f"usage: {Path(script).name}")


def test_help_of_a_command_comes_at_once():
    begin = time.perf_counter()
    done = run_script("bupo.py", "--help")
    assert time.perf_counter() - begin < 3  # a third of a second on a quiet machine; libraries take five
    assert done.returncode == 0 and "--internal_layer" in done.stdout and not done.stderr


def test_only_scripts_of_this_project_are_answered_for():
    """Imported by another program, pytest say, it must leave that program's signals and --help alone."""
    assert start.running_script() is None
    code = "import sys; sys.argv.append('--help'); import grpo; print('imported')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "imported\n"


def test_ctrl_c_while_libraries_load_is_one_line():
    """Fifty lines of traceback from inside torch for a command that was typed too early."""
    process = subprocess.Popen([sys.executable, ROOT / "grpo.py"], stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "interrupted\n"


@pytest.mark.parametrize("own, expected", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(own, expected, monkeypatch):
    """Threads that spin made a step of 3 seconds one of 60 on a busy machine."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    start.wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == expected


def test_threads_are_told_to_sleep_before_torch_is_loaded():
    """OpenMP reads its settings while torch is imported: a line too late, and nothing changes, without a word."""
    code = "import sys, runpy; sys.modules['torch'] = None; sys.modules['__main__'].__file__ = 'grpo.py'\n"
    code += "try: import plumbing.start, torch\nexcept ImportError: pass\n"
    code += "import os; print(os.environ.get('OMP_WAIT_POLICY'))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "PASSIVE\n", done.stderr
