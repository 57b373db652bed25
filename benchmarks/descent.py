"""What the probe of analyze_trajectory.answer_nll costs, against one forward pass per position, in seconds of one core.

Both give the loss of an answer after each of 201 prefixes of 200 tokens of thinking. `per_position` is what one writes
first: prompt, prefix and branch through the model, batch 1, all logits. `lean` is the best that can be done without
sharing anything between positions: only the answer's positions meet the head. Aim: at least 10 times faster. Two
settings: the embedded model's sizes, a prompt of 15 tokens and a cue of one; and a prompt of 100 tokens and a cue of
ten, as of a real tokenizer, in a small model that is yet too large for the caches. The token counts alone allow a ratio
of about (P + T/2 + S) / S, with S tokens of cue and answer: short prompts with long cues gain least. About two minutes.

    python benchmarks/descent.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3Config

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # imports start at the root of the repository

import common
from analyze_trajectory import answer_nll
from benchmarks.meters import core_seconds
from benchmarks.models import EMBEDDED, qwen3, random_model, random_tokens

T, ANSWER, REPEATS = 200, 3, 2


@dataclass
class Setting:
    """Tokens of the prompt and of the cue before the answer, and the model's shape."""

    prompt: int
    cue: int
    config: Qwen3Config


SETTINGS = {
    "embedded": Setting(prompt=15, cue=1, config=EMBEDDED),
    "8 blocks, width 256": Setting(prompt=100, cue=10, config=qwen3(256, 768, 8, 4, 2, V=8192, head_dim=64)),
}


def build(setting):
    """(model, inputs of the three functions below) of a setting."""
    model = random_model(setting.config)
    prompt, thinking, branch = random_tokens(setting.config.vocab_size, [setting.prompt, T, setting.cue + ANSWER])
    mask = [0] * setting.cue + [1] * ANSWER
    return model, prompt, thinking, branch, mask


def positions(prompt, thinking, branch, mask):
    """Yield, prefix after prefix, the ids [1, n] of prompt, prefix and branch, and where its answer's tokens stand."""
    answer = torch.tensor(mask).nonzero()[:, 0]
    for i in range(len(thinking) + 1):
        yield torch.tensor([prompt + thinking[:i] + branch]), len(prompt) + i + answer


@torch.no_grad()
def per_position(model, *inputs):
    losses = []
    for ids, at in positions(*inputs):
        logps = model(ids).logits[0, at - 1].log_softmax(-1)  # column t - 1 predicts token t
        losses.append(-logps.gather(1, ids[0, at, None]).mean())
    return torch.stack(losses)


@torch.no_grad()
def lean(model, *inputs):
    losses = []
    for ids, at in positions(*inputs):
        hidden = common.hidden_states(model, ids[:, :-1], torch.ones_like(ids[:, :-1]))
        logps, _ = common.token_logps(model, hidden[:, at - 1], ids[:, at])
        losses.append(-logps.mean())
    return torch.stack(losses)


def main():
    torch.set_num_threads(1)
    print(f"{T} tokens of thinking, answer of {ANSWER} tokens; seconds of one core")
    print(f"{'model':22}{'per_position':>14}{'lean':>8}{'answer_nll':>12}{'ratio':>8}{'to lean':>9}{'gap (nats)':>12}")
    for name, setting in SETTINGS.items():
        inputs = build(setting)
        least = []
        for function in (per_position, lean, answer_nll):
            least.append(min(core_seconds(function, *inputs) for _ in range(REPEATS)))
        slow, fair, fast = least
        gap = (per_position(*inputs) - answer_nll(*inputs)).abs().max().item()
        times = f"{slow:14.2f}{fair:8.2f}{fast:12.3f}{slow / fast:8.1f}{fair / fast:9.1f}"
        print(f"{name:22}{times}{gap:12.0e}", flush=True)


if __name__ == "__main__":
    main()
