"""Sampling on the CPU: the library's loop against model.generate, and its cache against transformers' DynamicLayer.

The first on a random model of the embedded size, two of whose 103 tokens end an answer: 16 prompts x 16 samples of up
to 256 tokens under the same rules; the mean lengths are printed. The second where rows finish all the time, on the same
model, and where all go on to the end, on a wider one; each side in processes of its own, because how fast large tensors
are had depends on what a process did before; both sides sample the same tokens. Medians in turns, two threads. Ten
minutes.

    python benchmarks/sampling.py
"""

import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from transformers import Qwen3Config
from transformers.cache_utils import DynamicLayer

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # imports start at the root of the repository

import common
from benchmarks.meters import alternating_medians, seconds
from benchmarks.models import EMBEDDED, blank_tokenizer, qwen3, random_model
from plumbing import kv_cache

PROMPTS, SAMPLES, NEW_TOKENS, LONGEST = 16, 16, 256, 15
WIDER = qwen3(256, 768, 4, 8, 4, V=2000, head_dim=32)


@dataclass
class Case:
    """What is sampled of which model, and how often both sides take their turn."""

    config: Qwen3Config
    ends: list | None
    prompts: int
    samples: int
    new_tokens: int
    rounds: int


CASES = {
    "skewed lengths up to 256": Case(EMBEDDED, [101, 102], 16, 16, 256, rounds=9),
    "32 rows of 256 tokens": Case(WIDER, None, 8, 4, 256, rounds=5),
    "32 rows of 1,024 tokens": Case(WIDER, None, 8, 4, 1024, rounds=3),
}


def prompts(n):
    """n prompts of 12 to 15 tokens."""
    lists = []
    for i in range(n):
        length = LONGEST - i % 4
        lists.append([(7 * i + j) % 90 for j in range(length)])
    return lists


def padded_prompts():
    """ids and attention mask [B, T] of every prompt SAMPLES times, padded on the left as `generate` wants it."""
    rows = [prompt for prompt in prompts(PROMPTS) for _ in range(SAMPLES)]
    ids = torch.tensor([[0] * (LONGEST - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (LONGEST - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def against_generate():
    model = random_model(EMBEDDED)
    model.generation_config.eos_token_id = [101, 102]
    tokenizer = blank_tokenizer(end=102, pad=102)
    ids, mask = padded_prompts()
    rules = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS, pad_token_id=102)
    our_lengths = []
    their_lengths = []

    def ours():
        rollouts = common.sample(model, tokenizer, prompts(PROMPTS), SAMPLES, NEW_TOKENS, seed=len(our_lengths))
        our_lengths.append(rollouts.lengths.float().mean().item())

    def theirs():
        completions = model.generate(ids, attention_mask=mask, **rules)[:, LONGEST:]
        ends = (completions >= 101).long()
        up_to_first_end = ends.cumsum(1) - ends == 0
        their_lengths.append(up_to_first_end.sum(1).float().mean().item())

    our_time, their_time = alternating_medians([ours, theirs], rounds=3)
    means = f"{statistics.mean(their_lengths):.0f} and {statistics.mean(our_lengths):.0f}"
    print(f"generate / common.sample: {their_time / our_time:.2f} (mean lengths {means})")


LAYERS = {"growing": kv_cache.GrowingLayer, "copying": lambda room: DynamicLayer()}


def worker(layer, case):
    """Seconds of sampling with that kind of cache layer, and a sum that tells whether the tokens are the same."""
    case = CASES[case]
    model = random_model(case.config)
    model.generation_config.eos_token_id = case.ends
    inputs = model, blank_tokenizer(), prompts(case.prompts), case.samples
    common.sample(*inputs, 8)  # warms up
    sampled = []
    with mock.patch.object(kv_cache, "GrowingLayer", LAYERS[layer]):
        time = seconds(lambda: sampled.append(common.sample(*inputs, case.new_tokens)))
    print(time, int(sampled[0].ids.sum()))


def in_a_process_of_its_own(layer, case):
    """What `worker` prints: (seconds, sum of the token ids)."""
    command = [sys.executable, __file__, layer, case]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    time, tokens = printed.split()
    return float(time), int(tokens)


def against_copying(case):
    times = {"growing": [], "copying": []}
    sums = set()
    for _ in range(CASES[case].rounds):
        for layer in times:
            time, tokens = in_a_process_of_its_own(layer, case)
            times[layer].append(time)
            sums.add(tokens)
    assert len(sums) == 1, "the two caches did not sample the same tokens"
    ratio = statistics.median(times["copying"]) / statistics.median(times["growing"])
    print(f"a cache copied for every token / one that grows in place, {case}: {ratio:.2f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    if sys.argv[1:]:
        worker(*sys.argv[1:])
    else:
        against_generate()
        for name in CASES:
            against_copying(name)
