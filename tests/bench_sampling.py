"""Sampling on the CPU: the library's loop against model.generate, and its cache against transformers' DynamicLayer.

The first on a random model of the embedded size, two of whose 100 tokens end an answer: 16 prompts x 16 samples of up
to 256 tokens under the same rules; the mean lengths are printed. The second where rows finish all the time, on the same
model, and where all go on to the end, on a wider one; each side in processes of its own, because how fast large tensors
are had depends on what a process did before; both sides sample the same tokens. Medians in turns, two threads. Ten
minutes.

    python tests/bench_sampling.py
"""

import statistics
import subprocess
import sys
from unittest import mock

import torch
from bench_memory import qwen3, random_model
from bench_phase_one import alternating_medians, seconds
from transformers.cache_utils import DynamicLayer

import common

PROMPTS, SAMPLES, NEW_TOKENS, LONGEST = 16, 16, 256, 15
EMBEDDED, WIDER = qwen3(96, 288, 6, 6, 3, V=100, head_dim=16), qwen3(256, 768, 4, 8, 4, V=2000, head_dim=32)
CASES = {  # config, end tokens, prompts, samples of each, longest answer, rounds
    "skewed lengths up to 256": (EMBEDDED, [98, 99], 16, 16, 256, 9),
    "32 rows of 256 tokens": (WIDER, None, 8, 4, 256, 5),
    "32 rows of 1,024 tokens": (WIDER, None, 8, 4, 1024, 3),
}


def prompts(n):
    """n prompts of 12 to 15 tokens."""
    return [[(7 * i + j) % 90 for j in range(LONGEST - i % 4)] for i in range(n)]


def against_generate():
    model, lengths = random_model(EMBEDDED), ([], [])
    model.generation_config.eos_token_id = [98, 99]
    padded = [[0] * (LONGEST - len(prompt)) + [1] * len(prompt) for prompt in prompts(PROMPTS)]
    mask = torch.tensor(padded).repeat_interleave(SAMPLES, 0)
    ids = mask.clone().masked_scatter(mask.bool(), torch.tensor([i for p in prompts(PROMPTS) for i in p * SAMPLES]))
    rules = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS, pad_token_id=99)

    def ours():
        tokenizer, seed = mock.Mock(eos_token_id=99, pad_token_id=99), len(lengths[0])
        rollouts = common.sample(model, tokenizer, prompts(PROMPTS), SAMPLES, NEW_TOKENS, seed=seed)
        lengths[0].append(rollouts.lengths.float().mean().item())

    def theirs():
        ends = (model.generate(ids, attention_mask=mask, **rules)[:, LONGEST:] >= 98).long()
        lengths[1].append((ends.cumsum(1) - ends == 0).sum(1).float().mean().item())  # up to the first end token

    times, means = alternating_medians([ours, theirs], rounds=3), [*map(statistics.mean, lengths)]
    print(f"generate / common.sample: {times[1] / times[0]:.2f} (mean lengths {means[1]:.0f} and {means[0]:.0f})")


def worker(layer, case):
    """Seconds of sampling with that kind of cache layer, and a sum that tells whether the tokens are the same."""
    config, ends, P, G, new_tokens, _ = CASES[case]
    model, found = random_model(config), []
    model.generation_config.eos_token_id = ends
    tokenizer, layers = mock.Mock(eos_token_id=None, pad_token_id=0), {"growing": common.GrowingLayer}
    layers["copying"] = lambda room: DynamicLayer()
    common.sample(model, tokenizer, prompts(P), G, 8)  # warms up
    with mock.patch.object(common, "GrowingLayer", layers[layer]):
        time = seconds(lambda: found.append(common.sample(model, tokenizer, prompts(P), G, new_tokens).ids))
    print(time, int(found[0].sum()))


def against_copying(case):
    def measure(layer):
        command = [sys.executable, __file__, layer, case]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    pairs = [(measure("growing"), measure("copying")) for _ in range(CASES[case][-1])]
    assert len({tokens for pair in pairs for _, tokens in pair}) == 1
    growing, copying = (statistics.median(float(time) for time, _ in column) for column in zip(*pairs))
    print(f"a cache copied for every token / one that grows in place, {case}: {copying / growing:.2f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    if sys.argv[1:]:
        worker(*sys.argv[1:])
    else:
        against_generate()
        for name in CASES:
            against_copying(name)
