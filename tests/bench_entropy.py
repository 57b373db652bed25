"""What looking inside costs: analyze_entropy.analyze on a 12-layer model, in seconds of one CPU core.

Against the floor, one forward pass and the head's product for every activation and nothing else (aim: at most 1.2 x
that); and against the plain way: answer by answer, every activation kept, each projected as the output of one module
and again as the input of the next, softmax and log-softmax of whole answers. Least of a few repeats; two minutes.

    python tests/bench_entropy.py
"""

import functools
import time

import torch
from test_analyze_entropy import Peak
from transformers import Qwen3Config, Qwen3ForCausalLM

import analyze_entropy
import common

L, D, V, REPEATS = 12, 512, 8192, 3


def model_and_answers(L=L):
    """A random Qwen3 with grouped-query attention, and 16 answers of 16 to 46 tokens behind prompts of 24."""
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=D // 4, tie_word_embeddings=True)
    config = Qwen3Config(vocab_size=V, hidden_size=D, intermediate_size=3 * D, num_hidden_layers=L, **heads)
    prompts, answers = torch.randint(V, (16, 24)).tolist(), [torch.randint(V, (n,)).tolist() for n in range(16, 48, 2)]
    return Qwen3ForCausalLM(config).eval(), common.assemble(prompts, answers, 0, "cpu")


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


@torch.no_grad()
def answer_by_answer(model, rollouts):
    """The plain way -> [4, L], token means of dH_layer, dH_attn, dH_ffn and the KL to the whole policy."""
    kept, handles = {}, []

    def keep(key):
        def hook(module, inputs, output):
            kept[key] = inputs, output[0] if isinstance(output, tuple) else output

        return hook

    for k, block in enumerate(model.model.layers):
        for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
            handles.append(getattr(block, name).register_forward_hook(keep((k, name))))
        handles.append(block.register_forward_hook(keep((k, "block"))))
    totals = torch.zeros(4, model.config.num_hidden_layers)
    for ids, attention_mask, mask in zip(rollouts.ids, rollouts.attention_mask, rollouts.mask):
        logits = model(ids[: int(attention_mask.sum())][None], use_cache=False).logits
        produced = mask.nonzero()[:, 0] - 1

        def policy(states):
            logits = model.lm_head(states[0, produced]).float()
            return logits.softmax(-1), logits.log_softmax(-1)

        def entropy(states):
            p, logps = policy(states)
            return -(p * logps).sum(-1)

        final = logits[0, produced].float().log_softmax(-1)
        for k in range(model.config.num_hidden_layers):
            ((before,), _), (_, after) = kept[k, "input_layernorm"], kept[k, "block"]
            p, logps = policy(after)
            changes = [
                entropy(after) - entropy(before),
                entropy(kept[k, "self_attn"][1]) - entropy(kept[k, "input_layernorm"][1]),
                entropy(kept[k, "mlp"][1]) - entropy(kept[k, "post_attention_layernorm"][1]),
                (p * (logps - final)).sum(-1),
            ]
            totals[:, k] += torch.stack(changes).sum(1)
    for handle in handles:
        handle.remove()
    return totals / rollouts.mask.sum()


def seconds(function, *inputs):
    start = time.process_time()  # of this process only: other work on the machine counts little
    function(*inputs)
    return time.process_time() - start


def peak(function, *inputs):
    """Most bytes of tensors alive at once, in 10^6."""
    with Peak() as measured:
        function(*inputs)
    return measured.bytes / 1e6


def main():
    torch.set_num_threads(1)
    inputs, functions = model_and_answers(), (forward, projections, analyze_entropy.analyze, answer_by_answer)
    times = [min(column) for column in zip(*[[seconds(f, *inputs) for f in functions] for _ in range(REPEATS)])]
    layers, plain = analyze_entropy.analyze(*inputs)["layers"], answer_by_answer(*inputs)
    names = ("dH_layer", "dH_attn", "dH_ffn", "kl_to_final")
    gap = max(abs(here[name] - float(plain[i, k])) for k, here in enumerate(layers) for i, name in enumerate(names))
    budgeted = functools.partial(analyze_entropy.analyze, micro_batch_tokens=2**12)
    peaks = {f: [peak(f, *model_and_answers(n)) for n in (L, 2 * L)] for f in (budgeted, answer_by_answer)}

    print(f"\n{L} layers, width {D}, vocabulary {V}, {int(inputs[1].mask.sum())} completion tokens, one core")
    for function, value in zip(functions, times):
        print(f"  {function.__name__:16} {value:6.2f} s")
    print(f"analyze / (forward + projections)  {times[2] / (times[0] + times[1]):.2f}  (aim: at most 1.2)")
    print(f"answer_by_answer / analyze         {times[3] / times[2]:.2f}")
    print(f"largest difference of their numbers {gap:.0e} nats")
    print(
        f"peak activations with {L} and {2 * L} layers, 10^6 bytes: "
        + "; ".join(
            f"{name} {values[0]:.0f} and {values[1]:.0f}"
            for name, values in zip(("analyze", "answer_by_answer"), peaks.values())
        )
    )


if __name__ == "__main__":
    main()
