"""Faults are named: a run that cannot learn says why and what to try, once when it happens and again at the end."""

import pytest
import torch
from helpers import arguments, read_jsonl, write_jsonl

import bookkeeping
import bupo
import common
import grpo
import sft
from plumbing.errors import UserError, one_line_errors
from plumbing.optimizer import Optimizer


def warnings_of(text):
    """The names of the warnings on stderr, in order."""
    return [line.split("warning: ")[1].split(" (")[0] for line in text.splitlines() if "warning: " in line]


# Each makes one thing go wrong -> the options of a run that must say so.


def no_signal(patch, data, folder):
    rows = [row | {"answer": "11"} for row in read_jsonl(data)]  # which the model never says
    return dict(data=str(write_jsonl(folder / "unsolvable.jsonl", rows)))


def all_truncated(patch, data, folder):
    return dict(max_completion_length=2)


def log_prob_gap(patch, data, folder):
    real_sample = common.sample

    def sample(*args, **kwargs):
        rollouts = real_sample(*args, **kwargs)
        rollouts.logps -= 0.3 * rollouts.mask
        return rollouts

    patch.setattr(common, "sample", sample)
    return {}


def entropy_collapse(patch, data, folder):
    real_logits = common.head_logits
    patch.setattr(common, "head_logits", lambda model, hidden: real_logits(model, hidden) * 1e3)
    return {}


def foreign_internal_policy(patch, data, folder):
    """Block 0 of a model whose embedding is long: its favourite is the token it has just read, by far."""
    real_states = common.hidden_states

    def hidden_states(*args):
        return real_states(*args) * (1.0 if args[3:4] in ((), (None,)) else 50.0)

    patch.setattr(common, "hidden_states", hidden_states)
    return dict(internal_layer=0, internal_steps=2, max_steps=3)


def vanishing_updates(patch, data, folder):
    return dict(learning_rate=1e-12)


def nonfinite_gradient(patch, data, folder):
    real_loss = grpo.loss
    factors = [torch.nan]  # of the first call; 1 from then on

    def loss(*args):
        value, metrics = real_loss(*args)
        return value * (factors.pop() if factors else 1.0), metrics

    patch.setattr(grpo, "loss", loss)
    return {}


FAULTS = {
    "no signal": no_signal,
    "all truncated": all_truncated,
    "log-prob gap": log_prob_gap,
    "entropy collapse": entropy_collapse,
    "foreign internal policy": foreign_internal_policy,
    "vanishing updates": vanishing_updates,
    "non-finite gradient": nonfinite_gradient,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named_once_and_again_at_the_end(fault, model_folder, data, monkeypatch, tmp_path, capsys):
    """A curve that stays flat for a night, and nothing on the screen says why."""
    script = bupo if fault == "foreign internal policy" else grpo
    args = arguments(script, model_folder, data, max_steps=4, num_prompts=4)
    for name, value in FAULTS[fault](monkeypatch, data, tmp_path).items():
        setattr(args, name, value)
    script.main(args)
    assert warnings_of(capsys.readouterr().err).count(fault) == 2


def test_every_fault_has_its_test():
    """One is tested where the verifier is: in test_common_grading.py."""
    assert set(bookkeeping.FAULTS) == {*FAULTS, "verifier"}


@pytest.mark.parametrize("seed", range(3))
def test_healthy_runs_raise_no_alarm(seed, model_folder, data, capsys):
    """A warning that is always there is read by nobody."""
    grpo.main(arguments(grpo, model_folder, data, max_steps=6, num_prompts=6, seed=seed))
    assert not warnings_of(capsys.readouterr().err)


@pytest.mark.parametrize(
    "phase, logp, told",
    [("internal", -10.1, True), ("internal", -9.9, False), ("internal", None, False), ("whole", -11.0, False)],
)
def test_an_internal_policy_is_foreign_below_ten_nats(phase, logp, told):
    """Said of the whole policy, or where nothing was trained, it would send people to an option that has no effect."""
    happens, remedy = bookkeeping.FAULTS["foreign internal policy"]
    assert happens(dict(phase=phase, trained_logp=logp)) == told
    assert not happens({})  # other scripts
    assert "--internal_norm true" in remedy and "\n" not in remedy


def test_the_log_prob_of_the_samples_under_the_trained_policy_is_logged(model_folder, data, monkeypatch):
    """Before the first update, under block k's policy, over the trained tokens only, however they are batched."""
    real_logps = common.completion_logps
    found = []

    def completion_logps(model, rollouts, rows, temperature, layer=None, norm=False):
        logps, entropy = real_logps(model, rollouts, rows, temperature, layer, norm)
        if torch.is_grad_enabled():
            found.append((layer, logps.detach().sum().item(), rollouts.mask[rows].sum().item()))
        return logps, entropy

    monkeypatch.setattr(common, "completion_logps", completion_logps)
    settings = dict(num_prompts=6, num_minibatches=1, internal_layer=0, internal_steps=1, max_steps=2)
    bupo.main(arguments(bupo, model_folder, data, **settings))
    for layer, record in zip((0, None), read_jsonl("run/metrics.jsonl")):
        total = sum(logps for k, logps, _ in found if k == layer)
        tokens = sum(count for k, _, count in found if k == layer)
        assert record["trained_logp"] == pytest.approx(total / tokens, rel=1e-4)


def test_the_end_of_a_schedule_raises_no_alarm(model_folder, capsys):
    """The first command of every newcomer builds the embedded model: its cosine ends in steps too small to matter."""
    settings = dict(max_completion_length=128, problems=500)
    sft.main(arguments(sft, model_folder, "arithmetic", learning_rate=3e-6, max_steps=40, **settings))
    assert not warnings_of(capsys.readouterr().err)
    sft.main(arguments(sft, model_folder, "arithmetic", learning_rate=1e-12, output_dir="vain", **settings))
    assert "vanishing updates" in warnings_of(capsys.readouterr().err)


@pytest.mark.parametrize("learning_rate, share", [(1e-3, 1.0), (1e-12, 0.0), (0.0, None)])
def test_updates_vanish_below_a_weights_last_bit(learning_rate, share):
    """The log must say so instead of going on in silence. At 0, or without any update, nothing is meant to move."""
    model = torch.nn.Linear(40, 40, bias=False)
    torch.nn.init.uniform_(model.weight, 0.5, 1.0)
    optimizer = Optimizer(model, grpo.Args(learning_rate=learning_rate))
    model(torch.ones(1, 40)).sum().backward()
    optimizer.step()
    happens, _ = bookkeeping.FAULTS["vanishing updates"]
    for expected in (share, None):
        summary = optimizer.summary()
        assert summary["updated_share"] == expected
        assert happens(summary) == (expected == 0.0)


def test_the_gap_between_sampler_and_trainer_is_logged(model_folder, data, monkeypatch, tmp_path):
    """Two code paths that drift apart train another policy than the one sampled: the reward just stays flat."""
    log_prob_gap(monkeypatch, data, tmp_path)
    grpo.main(arguments(grpo, model_folder, data, num_prompts=6))
    assert read_jsonl("run/metrics.jsonl")[0]["logp_gap"] == pytest.approx(0.3, abs=1e-4)


def test_ten_nonfinite_gradients_in_a_row_end_the_run(model_folder, data, monkeypatch):
    """Skipping for ever is a run that trains nothing; the steps skipped are counted in the log."""
    real_loss = grpo.loss
    monkeypatch.setattr(grpo, "loss", lambda *args: (real_loss(*args)[0] * torch.nan, {}))
    with pytest.raises(UserError, match="10 non-finite gradients in a row; lower --learning_rate"):
        grpo.main(arguments(grpo, model_folder, data, max_steps=40, num_prompts=4))
    records = read_jsonl("run/metrics.jsonl")
    assert sum(record["skipped_steps"] for record in records) == 9


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "place, option",
    [("growing_cache", "--max_rollout_tokens"), ("completion_logps", "--micro_batch_tokens")],
    ids=["sampling", "training"],
)
def test_a_full_gpu_is_one_line_that_names_the_option(place, option, model_folder, data, monkeypatch, capsys):
    """Eighty lines of traceback end in a number of bytes; the reader wants to know what to lower."""
    monkeypatch.setattr(common, place, out_of_memory)
    with pytest.raises(SystemExit) as end, one_line_errors():
        grpo.main(arguments(grpo, model_folder, data))
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: out of GPU memory") and option in line
