"""What the probe of analyze_trajectory.answer_nll costs, against one forward pass per position, in seconds of one core.

Both give the loss of an answer after each of 201 prefixes of 200 tokens of thinking. `per_position` is what one writes
first: prompt, prefix and branch through the model, batch 1, all logits. `lean` is the best that can be done without
sharing anything between positions: only the answer's positions meet the head. Aim: at least 10 times faster. Two
settings: the embedded model's sizes, a prompt of 15 tokens and a cue of one; and a prompt of 100 tokens and a cue of
ten, as of a real tokenizer, in a small model that is yet too large for the caches. The token counts alone allow a ratio
of about (P + T/2 + S) / S, with S tokens of cue and answer: short prompts with long cues gain least. About two minutes.

    python tests/bench_descent.py
"""

import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from conftest import TOKENIZER  # first: it finds the repository

import common
from analyze_trajectory import answer_nll

T, REPEATS = 200, 2
# Name: prompt tokens, cue tokens, and blocks, width, heads, vocabulary of the model.
SETTINGS = {"embedded": (15, 1, (6, 96, 6, len(TOKENIZER))), "8 blocks, width 256": (100, 10, (8, 256, 4, 8192))}


def build(L, D, heads, V):
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=D, intermediate_size=3 * D, num_hidden_layers=L, head_dim=D // heads)
    heads = dict(num_attention_heads=heads, num_key_value_heads=heads // 2, tie_word_embeddings=True)
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).eval()


@torch.no_grad()
def per_position(model, prompt, thinking, branch, mask):
    losses, answer = [], torch.tensor(mask).nonzero()[:, 0]
    for i in range(len(thinking) + 1):
        ids, at = torch.tensor([prompt + thinking[:i] + branch]), len(prompt) + i + answer
        logps = model(ids).logits[0, at - 1].log_softmax(-1)  # column t - 1 predicts token t
        losses.append(-logps.gather(1, ids[0, at, None]).mean())
    return torch.stack(losses)


@torch.no_grad()
def lean(model, prompt, thinking, branch, mask):
    losses, answer = [], torch.tensor(mask).nonzero()[:, 0]
    for i in range(len(thinking) + 1):
        ids, at = torch.tensor([prompt + thinking[:i] + branch]), len(prompt) + i + answer
        hidden = common.hidden_states(model, ids[:, :-1], torch.ones_like(ids[:, :-1]))
        losses.append(-common.token_logps(model, hidden[:, at - 1], ids[:, at])[0].mean())
    return torch.stack(losses)


def seconds(function, *inputs):
    start = time.process_time()  # of this process only: other work on the machine counts little
    function(*inputs)
    return time.process_time() - start


def main():
    torch.set_num_threads(1)
    print(f"{T} tokens of thinking, answer of 3 tokens; seconds of one core")
    print(f"{'model':22}{'per_position':>14}{'lean':>8}{'answer_nll':>12}{'ratio':>8}{'to lean':>9}{'gap (nats)':>12}")
    for name, (P, cue, sizes) in SETTINGS.items():
        model = build(*sizes)
        prompt, thinking, branch = (torch.randint(sizes[-1], (n,)).tolist() for n in (P, T, cue + 3))
        inputs = model, prompt, thinking, branch, [0] * cue + [1] * 3
        functions = per_position, lean, answer_nll
        slow, fair, fast = (min(seconds(function, *inputs) for _ in range(REPEATS)) for function in functions)
        gap = (per_position(*inputs) - answer_nll(*inputs)).abs().max().item()
        times = f"{slow:14.2f}{fair:8.2f}{fast:12.3f}{slow / fast:8.1f}{fair / fast:9.1f}"
        print(f"{name:22}{times}{gap:12.0e}", flush=True)


if __name__ == "__main__":
    main()
