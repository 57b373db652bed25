"""Faults are named: a run that cannot learn says why and what to try, once when it happens and again at the end."""

import pytest
import torch
from conftest import arguments, read_jsonl, write_jsonl

import bookkeeping
import common
import grpo
import sft


def warnings_of(text):
    """The names of the warnings on stderr, in order."""
    return [line.split("warning: ")[1].split(" (")[0] for line in text.splitlines() if "warning: " in line]


def no_signal(monkeypatch, data, tmp_path):
    rows = [row | {"answer": "11"} for row in read_jsonl(data)]
    return dict(data=write_jsonl(tmp_path / "unsolvable.jsonl", rows))


def all_truncated(monkeypatch, data, tmp_path):
    return dict(max_completion_length=2)


def logp_gap(monkeypatch, data, tmp_path):
    real = common.sample

    def sample(*args, **kwargs):
        rollouts = real(*args, **kwargs)
        rollouts.logps -= 0.1 * rollouts.mask
        return rollouts

    monkeypatch.setattr(common, "sample", sample)
    return {}


def entropy_collapse(monkeypatch, data, tmp_path):
    real = common.head_logits
    monkeypatch.setattr(common, "head_logits", lambda model, hidden: real(model, hidden) * 1e3)
    return {}


def vanishing_updates(monkeypatch, data, tmp_path):
    return dict(learning_rate=1e-12)


def nonfinite_gradient(monkeypatch, data, tmp_path):
    real, calls = grpo.loss, []

    def loss(*args):
        value, metrics = real(*args)
        calls.append(value)
        return value * (torch.nan if len(calls) == 1 else 1.0), metrics

    monkeypatch.setattr(grpo, "loss", loss)
    return {}


FAULTS = {
    "no signal": no_signal,
    "all truncated": all_truncated,
    "log-prob gap": logp_gap,
    "entropy collapse": entropy_collapse,
    "vanishing updates": vanishing_updates,
    "non-finite gradient": nonfinite_gradient,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named_once_and_again_at_the_end(fault, model_folder, data, monkeypatch, tmp_path, capsys):
    """A curve that stays flat for a night, and nothing on the screen says why."""
    options = FAULTS[fault](monkeypatch, data, tmp_path)
    data = options.pop("data", data)
    grpo.main(arguments(grpo, model_folder, data, max_steps=4, num_prompts=4, **options))
    assert warnings_of(capsys.readouterr().err).count(fault) == 2


@pytest.mark.parametrize("seed", range(3))
def test_healthy_runs_raise_no_alarm(seed, model_folder, data, capsys):
    """A warning that is always there is read by nobody."""
    grpo.main(arguments(grpo, model_folder, data, max_steps=6, num_prompts=6, seed=seed))
    assert not warnings_of(capsys.readouterr().err)


def test_the_end_of_a_schedule_raises_no_alarm(model_folder, capsys):
    """The first command of every newcomer builds the embedded model: its cosine ends in steps too small to matter."""
    sft.main(arguments(sft, model_folder, "arithmetic", learning_rate=3e-6, max_steps=40))
    assert not warnings_of(capsys.readouterr().err)
    sft.main(arguments(sft, model_folder, "arithmetic", learning_rate=1e-12, output_dir="vain"))
    assert "vanishing updates" in warnings_of(capsys.readouterr().err)


def test_ten_nonfinite_gradients_in_a_row_end_the_run(model_folder, data, monkeypatch):
    """Skipping for ever is a run that trains nothing; the steps skipped are counted in the log."""
    real = grpo.loss
    monkeypatch.setattr(grpo, "loss", lambda *args: (real(*args)[0] * torch.nan, {}))
    with pytest.raises(common.UserError, match="10 non-finite gradients in a row; lower --learning_rate"):
        grpo.main(arguments(grpo, model_folder, data, max_steps=40, num_prompts=4))
    records = read_jsonl("run/metrics.jsonl")
    assert sum(record["skipped_steps"] for record in records) == 9


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "place, option", [("sample_wave", "--max_rollout_tokens"), ("completion_logps", "--micro_batch_tokens")]
)
def test_a_full_gpu_is_one_line_that_names_the_option(place, option, model_folder, data, monkeypatch, capsys):
    """Eighty lines of traceback end in a number of bytes; the reader wants to know what to lower."""
    if place == "sample_wave":
        monkeypatch.setattr(common, "DynamicCache", out_of_memory)  # inside sample_wave
    else:
        monkeypatch.setattr(common, place, out_of_memory)
    with pytest.raises(SystemExit) as end, common.one_line_errors():
        grpo.main(arguments(grpo, model_folder, data))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and lines[-1].startswith("error: out of GPU memory") and option in lines[-1]


def test_the_share_of_surviving_updates():
    """At a step far below a weight's last bit nothing moves, and the log must say so instead of going on in silence."""
    for learning_rate, share in ((1e-3, 1.0), (1e-12, 0.0), (0.0, None)):  # at 0 nothing is meant to move
        model = torch.nn.Linear(40, 40, bias=False)
        torch.nn.init.uniform_(model.weight, 0.5, 1.0)
        optimizer = common.Optimizer(model, grpo.Args(learning_rate=learning_rate))
        model(torch.ones(1, 40)).sum().backward()
        optimizer.step()
        summary = optimizer.summary()
        assert summary["updated_share"] == share
        assert bookkeeping.FAULTS["vanishing updates"][0](summary) == (share == 0.0)
        assert optimizer.summary()["updated_share"] is None  # of no update
