"""benchmarks/threads.py: a step runs in a process of each way, and the table says what the times say."""

import importlib.util
import subprocess

import pytest
from helpers import ROOT
from transformers import AutoConfig

import sft


def benchmark(name):
    """A module of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"measured_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


threads = benchmark("threads")
models = benchmark("models")


def test_the_benchmarks_embedded_model_is_the_one_that_is_built(tmp_path):
    """It was not, once: the model had been rebuilt, and the threads were chosen for the one before."""
    sft.build_embedded(tmp_path)
    built = AutoConfig.from_pretrained(tmp_path)
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
    ):
        assert getattr(built, name) == getattr(models.EMBEDDED, name), name


def test_a_step_takes_time_in_a_process_of_its_own():
    """One warm-up, and as many timed steps as were asked for."""
    [(imitation, sampling)] = threads.measure("one thread", steps=1)
    assert imitation > 0 and sampling > 0


def test_every_way_has_its_own_settings(monkeypatch):
    """What the caller's shell says of OpenMP must not reach the ways: all of them would measure the same."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    environments = {}

    def run(command, env, **_):
        environments[len(environments)] = env
        return subprocess.CompletedProcess(command, 0, stdout="[[2.0, 1.0]]", stderr="")

    monkeypatch.setattr(threads.subprocess, "run", run)
    for way in threads.WAYS:
        assert threads.measure(way, steps=1) == [(2.0, 1.0)]
    one, patient, asleep, spinning = environments.values()
    assert (one["OMP_NUM_THREADS"], one["OMP_WAIT_POLICY"]) == ("1", "PASSIVE")
    assert (patient["OMP_NUM_THREADS"], patient["GOMP_SPINCOUNT"]) == ("2", "10000")
    assert "GOMP_SPINCOUNT" not in asleep
    assert asleep["OMP_WAIT_POLICY"] == "PASSIVE" and asleep["OMP_NUM_THREADS"] == spinning["OMP_NUM_THREADS"] != "7"
    assert not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(spinning)


def test_busy_processes_are_there_while_it_is_measured_and_gone_afterwards(monkeypatch):
    """Left behind, they would take a core each from whatever runs next."""
    started = []
    real = subprocess.Popen

    def popen(*command, **options):
        started.append(real(*command, **options))
        return started[-1]

    def measure(way, steps):
        assert [process.poll() for process in started] == [None, None]
        return [(1.0, 0.5), (3.0, 0.7), (2.0, 0.6)]

    monkeypatch.setattr(threads.subprocess, "Popen", popen)
    monkeypatch.setattr(threads, "measure", measure)
    try:
        found = threads.medians(rounds=1, steps=3, busy=2)
        assert found["one thread"] == (2.0, 0.6)
        assert all(process.poll() is not None for process in started)
    finally:
        for process in started:
            process.kill()


def test_the_table_by_hand():
    """Slower: the time beside others over the time alone, of imitation and of sampling each."""
    alone = dict(zip(threads.WAYS, [(1.0, 2.0), (0.9, 1.1), (0.8, 1.2), (0.5, 1.0)]))
    beside = dict(zip(threads.WAYS, [(2.0, 2.0), (1.8, 1.1), (2.4, 1.2), (4.0, 3.0)]))
    rows = [line.split() for line in threads.report(alone, beside)]
    assert len(rows) == 2 * (1 + len(threads.WAYS))
    assert rows[1][2:] == ["1.00", "2.00", "2.00"]  # one thread imitates
    assert rows[4][2:] == ["0.50", "4.00", "8.00"]
    assert rows[6][2:] == ["2.00", "2.00", "1.00"]  # one thread samples
    assert rows[9][2:] == ["1.00", "3.00", "3.00"]


def test_a_process_that_fails_is_told(monkeypatch):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nNameError: step")
    monkeypatch.setattr(threads.subprocess, "run", lambda *command, **options: done)
    with pytest.raises(SystemExit, match="NameError: step"):
        threads.measure("one thread", steps=1)
