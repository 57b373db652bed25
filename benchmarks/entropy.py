"""What looking inside costs: analyze_entropy.analyze on a 12-layer model, in seconds of one CPU core.

Against the floor, one forward pass and the head's product for every activation and nothing else (aim: at most 1.2 x
that); and against the plain way: answer by answer, every activation kept, each projected as the output of one module
and again as the input of the next, softmax and log-softmax of whole answers. Least of a few repeats; two minutes.

    python benchmarks/entropy.py
"""

import functools
import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # imports start at the root of the repository

import analyze_entropy
import common
from benchmarks.meters import core_seconds, peak_bytes
from benchmarks.models import qwen3, random_model, random_tokens

L, D, V, REPEATS = 12, 512, 8192, 3
NAMES = ("dH_layer", "dH_attn", "dH_ffn", "kl_to_final")


def model_and_answers(L=L):
    """A random Qwen3 with grouped-query attention, and 16 answers of 16 to 46 tokens behind prompts of 24."""
    model = random_model(qwen3(D, 3 * D, L, 4, 2, V=V, head_dim=D // 4))
    prompts = random_tokens(V, [24] * 16)
    answers = random_tokens(V, range(16, 48, 2))
    return model, common.assemble(prompts, answers, 0, "cpu")


@torch.no_grad()
def forward(model, rollouts):
    """The blocks alone, over the batch in which `analyze` runs them."""
    common.hidden_states(model, rollouts.ids[:, :-1], rollouts.attention_mask[:, :-1])


@torch.no_grad()
def projections(model, rollouts):
    """The head's product alone: six activations a block, the embedding, the whole policy; chunked as in `analyze`."""
    states = torch.randn(int(rollouts.mask.sum()), D)
    for _ in range(6 * L + 2):
        for piece in states.split(analyze_entropy.CHUNK_TOKENS["cpu"]):
            common.head_logits(model, piece)


def keep_activations(model):
    """-> ({(block, module): (inputs, output)}, filled anew by every forward pass; handles that end it)."""
    kept = {}
    handles = []

    def keep(key):
        def hook(module, inputs, output):
            kept[key] = inputs, output[0] if isinstance(output, tuple) else output

        return hook

    for k, block in enumerate(model.model.layers):
        handles.append(block.register_forward_hook(keep((k, "block"))))
        for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
            handles.append(getattr(block, name).register_forward_hook(keep((k, name))))
    return kept, handles


def policy_of(model, states):
    """States [n, D] -> probabilities and log-probabilities [n, V], each by its own softmax."""
    logits = model.lm_head(states).float()
    return logits.softmax(-1), logits.log_softmax(-1)


def entropy_of(p, logps):
    return -(p * logps).sum(-1)


@torch.no_grad()
def answer_by_answer(model, rollouts):
    """The plain way -> [4, L], token means of dH_layer, dH_attn, dH_ffn and the KL to the whole policy."""
    kept, handles = keep_activations(model)
    totals = torch.zeros(4, model.config.num_hidden_layers)
    for ids, attention_mask, mask in zip(rollouts.ids, rollouts.attention_mask, rollouts.mask):
        logits = model(ids[: int(attention_mask.sum())][None], use_cache=False).logits
        produced = mask.nonzero()[:, 0] - 1
        final = logits[0, produced].float().log_softmax(-1)

        def entropy(states):
            return entropy_of(*policy_of(model, states[0, produced]))

        for k in range(model.config.num_hidden_layers):
            inputs, normed = kept[k, "input_layernorm"]
            _, after = kept[k, "block"]
            _, attention = kept[k, "self_attn"]
            _, normed_again = kept[k, "post_attention_layernorm"]
            _, ffn = kept[k, "mlp"]
            p, logps = policy_of(model, after[0, produced])
            dH_layer = entropy(after) - entropy(inputs[0])
            dH_attn = entropy(attention) - entropy(normed)
            dH_ffn = entropy(ffn) - entropy(normed_again)
            kl_to_final = (p * (logps - final)).sum(-1)
            totals[:, k] += torch.stack([dH_layer, dH_attn, dH_ffn, kl_to_final]).sum(1)
    for handle in handles:
        handle.remove()
    return totals / rollouts.mask.sum()


def largest_gap(layers, plain):
    """Between analyze's list of layers and answer_by_answer's table."""
    ours = torch.tensor([[layer[name] for layer in layers] for name in NAMES])
    return float((ours - plain).abs().max())


def main():
    torch.set_num_threads(1)
    inputs = model_and_answers()
    functions = (forward, projections, analyze_entropy.analyze, answer_by_answer)
    rounds = [[core_seconds(function, *inputs) for function in functions] for _ in range(REPEATS)]
    times = [min(column) for column in zip(*rounds)]
    gap = largest_gap(analyze_entropy.analyze(*inputs)["layers"], answer_by_answer(*inputs))
    budgeted = functools.partial(analyze_entropy.analyze, micro_batch_tokens=2**12)
    peaks = []
    for name, function in (("analyze", budgeted), ("answer_by_answer", answer_by_answer)):
        few, many = (peak_bytes(function, *model_and_answers(layers)) / 1e6 for layers in (L, 2 * L))
        peaks.append(f"{name} {few:.0f} and {many:.0f}")

    print(f"\n{L} layers, width {D}, vocabulary {V}, {int(inputs[1].mask.sum())} completion tokens, one core")
    for function, value in zip(functions, times):
        print(f"  {function.__name__:16} {value:6.2f} s")
    print(f"analyze / (forward + projections)  {times[2] / (times[0] + times[1]):.2f}  (aim: at most 1.2)")
    print(f"answer_by_answer / analyze         {times[3] / times[2]:.2f}")
    print(f"largest difference of their numbers {gap:.0e} nats")
    print(f"peak activations with {L} and {2 * L} layers, 10^6 bytes: " + "; ".join(peaks))


if __name__ == "__main__":
    main()
