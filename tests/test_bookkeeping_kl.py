"""The KL between two policies, and to the starting model: on the samples of one, at the temperature of these."""

import pytest
import torch
from helpers import TOKENIZER, arguments, read_jsonl, tiny_model
from objectives import k3, masked_average, textbook

import bookkeeping
import common
import grpo
from bookkeeping import kl_between


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("budget", [1, 10**6], ids=["row_by_row", "at_once"])
@torch.no_grad()
def test_kl_is_measured_at_the_temperature_of_the_samples(temperature, budget):
    """The two models swapped, one of them read at another temperature, padding counted, or a log-ratio for k3."""
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    rollouts = common.sample(model, TOKENIZER, [[7, 8, 9], [10]], 6, 8, temperature, seed=0)
    assert abs(kl_between(model, model, rollouts, budget, temperature)) < 1e-9
    total = 0.0
    for row in range(12):
        start, end = (3 if row < 6 else 1), int(rollouts.attention_mask[row].sum())
        ids = rollouts.ids[row, :end]
        p, q = (m(ids[None]).logits[0, start - 1 : end - 1].double() / temperature for m in (model, other))
        x = (q.log_softmax(-1) - p.log_softmax(-1)).gather(1, ids[start:, None])
        total += float((x.exp() - x - 1).sum())
    found = kl_between(model, other, rollouts, budget, temperature)
    assert found == pytest.approx(total / float(rollouts.mask.sum()), rel=1e-4)


def test_kl_to_start_is_taken_at_the_evaluations_temperature(model_folder, data, monkeypatch):
    """The samples are drawn at --eval_temperature; the KL of another temperature is not the KL of these samples."""
    rollouts = []
    real = bookkeeping.Run.kl_to_start

    def kl_to_start(run, sampled):
        rollouts.append(sampled)
        return real(run, sampled)

    monkeypatch.setattr(bookkeeping.Run, "kl_to_start", kl_to_start)
    settings = dict(temperature=0.8, eval_temperature=0.5, eval_steps=1, learning_rate=1e-2, max_steps=1)
    grpo.main(arguments(grpo, model_folder, data, num_prompts=6, **settings))
    found = read_jsonl("run/metrics.jsonl")[-1]["kl_to_start"]
    assert len(rollouts[0].ids) == 2 * 4  # the samples, not the greedy answers: two to each of four problems
    _, logps, _, mask = textbook("run", rollouts[0], 0.5)
    _, start_logps, _, _ = textbook(model_folder, rollouts[0], 0.5)
    expected = masked_average(k3(logps, start_logps), mask)
    assert found == pytest.approx(expected.item(), rel=1e-3)
    assert found > 1e-3


def test_kl_of_a_chained_run_is_to_the_model_the_chain_began_with(model_folder, data):
    """EM, then RL, 'stayed nearer to the start': its KL was to the EM model, not to the start."""
    settings = dict(eval_steps=1, learning_rate=1e-2, max_steps=1, num_prompts=6)
    grpo.main(arguments(grpo, model_folder, data, output_dir="first", **settings))
    grpo.main(arguments(grpo, "first", data, output_dir="second", **settings))
    first = kl_of("first")
    second = kl_of("second")
    assert first[0] == 0 and first[1] > 1e-3
    assert second[0] == pytest.approx(first[1])  # the same model, asked the same, before it is trained further
    assert second[1] != pytest.approx(second[0])


def kl_of(folder):
    return [record["kl_to_start"] for record in read_jsonl(f"{folder}/metrics.jsonl") if "kl_to_start" in record]
