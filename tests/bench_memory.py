"""What a training run takes of the GPU's memory, planned from a model's config before anything is loaded.

`plan` counts by hand what training keeps alive at its fullest moments, component by component. The script prints it for
four Qwen3 shapes under the training defaults, or under the options given (those of every training script), and then
checks it against the bytes of live tensors on three small CPU models, with and without gradient checkpointing: every
component and the total must agree within 15%. Seconds.

    python tests/bench_memory.py
    python tests/bench_memory.py --micro_batch_tokens 32768 --optimizer_device cpu
    python tests/bench_memory.py --model path/to/model
"""

from unittest import mock

import torch
from test_analyze_entropy import Peak
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

import common

GIB = 2**30
CARDS = (24, 48, 80, 141)  # GB of memory, 10^9 bytes
COMPONENTS = ("weights", "gradients", "optimizer", "activations", "head", "cache", "total")


def qwen3(D, intermediate, L, heads, kv_heads, V=151936, head_dim=128, tied=True):
    return Qwen3Config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=intermediate,
        num_hidden_layers=L,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
    )


SHAPES = {
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, 8),
    "Qwen3-1.7B": qwen3(2048, 6144, 28, 16, 8),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, 8),
    "Qwen3-8B": qwen3(4096, 12288, 36, 32, 8, tied=False),
}


def random_model(config, device="cpu", dtype=torch.float32, seed=0):
    """A model of this shape with random weights, made on the device itself."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_rollouts(V, prompts, completions, device="cpu"):
    """Rollouts of random tokens; prompts, completions: their lengths, row by row."""
    generator = torch.Generator().manual_seed(0)

    def words(n):
        return torch.randint(V, (n,), generator=generator).tolist()

    return common.assemble([words(n) for n in prompts], [words(n) for n in completions], 0, device)


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


def plan(config, args):
    """GiB on the device by component, for a Qwen3-like config and the options of a training run (common.RunArgs).

    Sampling and training take turns, as do blocks and head: `total` is weights, optimizer and the fullest moment.
    """
    s = 4 if args.dtype == "float32" else 2  # bytes of a weight, a gradient, an activation
    D, L, V, heads = config.hidden_size, config.num_hidden_layers, config.vocab_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or D // heads
    Q, K = heads * head_dim, config.num_key_value_heads * head_dim
    with torch.device("meta"):  # the very model, without its memory
        sizes = [p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()]
    longest = args.max_prompt_length + args.max_completion_length
    tokens = max(longest, args.micro_batch_tokens)  # of a micro-batch, all of it completion at worst

    # Sampling: keys and values of a wave; beside them those of a layer that are just moving to a larger place, or at
    # the head log-probs, probabilities and their product.
    rows = max(1, args.max_rollout_tokens // longest)
    layer = 2 * K * s * rows * longest
    cache = L * layer + max(layer // 2, 3 * 4 * rows * V)

    # Training, bytes per token. A norm keeps its input in fp32 and the normalised one; its output is what the next
    # product keeps. Attention: two norms of heads; queries, outputs, keys and values.
    norm = (4 + 2 * s) * D
    attention = norm + (4 + s) * (Q + K) + 2 * s * (Q + K) + 4 * heads
    if s == 4:
        attention -= 4 * D  # the first norm's input is the block's, counted below
    mlp = norm + 4 * s * config.intermediate_size  # gate, its SiLU, up, their product
    inputs = L * s * D + 2 * s * head_dim  # every block's; sines and cosines
    kept = inputs + (0 if args.gradient_checkpointing else L * (attention + mlp))
    # Backward through a block: itself, recomputed; two gradients as wide as the MLP; the stream and its gradient.
    block = (attention + mlp if args.gradient_checkpointing else 0) + 2 * s * (config.intermediate_size + D)
    # Backward through a chunk of the head: log-probs and two gradients like them, in fp32, beside the matrix's gradient
    # of the chunks before; or that gradient, this chunk's and their sum. The states' gradient, in pieces and in one.
    matrix = V * D * s
    chunk = 4 * V * min(tokens, max(1, common.CHUNK_LOGITS // V))
    head = matrix + max(3 * chunk, 2 * matrix) + 2 * s * D * tokens
    under_head = tokens * (kept + norm + s * D)  # the final norm, and the completion's states picked from it

    weights = gradients = sum(sizes) * s
    optimizer = 0 if args.optimizer_device == "cpu" else sum(sizes) * (8 if s == 4 else 12)  # fp32 is its own master
    update = 0 if s == 4 else 4 * max(sizes)  # one gradient at a time in fp32
    activations = tokens * (kept + block)
    tied = matrix if config.tie_word_embeddings else 0  # the head's gradient waits for the embedding's
    training = gradients + max(activations + tied, under_head + head, update)
    total = weights + optimizer + max(cache, training)
    figures = (weights, gradients, optimizer, activations, head, cache, total)
    return {name: figure / GIB for name, figure in zip(COMPONENTS, figures)}


def print_table(rows):
    """rows: (name, dict of GiB). What fits a card must leave 5% of it to the allocator and the CUDA context."""
    print("GiB".ljust(38) + "".join(name.rjust(12) for name in COMPONENTS) + "   fits GB")
    for name, figures in rows:
        fits = [str(card) for card in CARDS if figures["total"] * GIB <= 0.95e9 * card]
        print(name.ljust(38) + "".join(f"{figures[c]:12.2f}" for c in COMPONENTS) + f"   {' '.join(fits) or 'none'}")


# ---------------------------------------------------------------------------------------------------------------------
# The check
# ---------------------------------------------------------------------------------------------------------------------

SMALL = {  # config, dtype, longest sequence, tokens of a micro-batch and of a wave
    "wide, tied, bf16": (qwen3(256, 768, 4, 8, 4, V=2000, head_dim=32), "bfloat16", 48, 384, 1536),
    "deep, untied": (qwen3(96, 288, 8, 6, 2, V=1000, head_dim=16, tied=False), "float32", 48, 384, 768),
    "large vocabulary, tied": (qwen3(64, 192, 6, 4, 2, V=8000, head_dim=16), "float32", 32, 256, 1024),
}


def peak(function):
    """Most bytes of new tensors alive at once."""
    with Peak() as measured:
        function()
    return measured.bytes


def distinct_bytes(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(config, args):
    """The components of `plan`, counted in live tensors while the library's functions run."""
    model = random_model(config, dtype=getattr(torch, args.dtype))
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.generation_config.eos_token_id, tokenizer = None, mock.Mock(eos_token_id=None, pad_token_id=0)
    optimizer, parameters = common.Optimizer(model, args), list(model.parameters())
    longest, n = args.max_prompt_length + args.max_completion_length, args.micro_batch_tokens
    full, rows = n // longest, args.max_rollout_tokens // longest
    lengths = [longest - 1 - i % 2 for i in range(2 * full)]  # not all the same: batches are padded
    batch = random_rollouts(config.vocab_size, [1] * len(lengths), lengths)

    def sample():
        ragged = [batch.ids[0, : args.max_prompt_length - i].tolist() for i in range(2)]
        common.sample(model, tokenizer, ragged, rows // 2, args.max_completion_length, 1.0, args.max_rollout_tokens)

    def blocks():
        ids, mask = batch.ids[:full], batch.attention_mask[:full]
        hidden = common.hidden_states(model, ids, mask)
        hidden.backward(torch.ones_like(hidden))

    def head():
        hidden = torch.randn(1, n, config.hidden_size, dtype=model.dtype, requires_grad=True)
        common.token_logps(model, hidden, torch.zeros(1, n, dtype=torch.long))[0].sum().backward()

    def train():
        for rows in common.micro_batches(batch, range(2 * full), n):
            common.completion_logps(model, batch, rows, 1.0)[0].sum().backward()
        optimizer.step()

    model.train()
    train()  # the optimizer's state exists from here on
    weights = distinct_bytes(parameters)
    state = [t for x in optimizer.state_dict().values() for t in (x["master"], *x["adam"]["state"][0].values())]
    resident = distinct_bytes([*parameters, *state])
    sampling = peak(sample)
    total = max(sampling, peak(train))
    for p in parameters:
        p.grad = torch.zeros_like(p)  # of an earlier micro-batch
    figures = (weights, distinct_bytes(p.grad for p in parameters), resident - weights)
    figures += (peak(blocks), peak(head), sampling, resident + total)
    return {name: figure / GIB for name, figure in zip(COMPONENTS, figures)}


def checks():
    """Yield (name, planned, measured) for every small model, with and without gradient checkpointing."""
    for name, (config, dtype, longest, micro_batch_tokens, max_rollout_tokens) in SMALL.items():
        for checkpointing in (True, False):
            args = common.RunArgs(
                dtype=dtype,
                max_prompt_length=longest - longest // 4,
                max_completion_length=longest // 4,
                micro_batch_tokens=micro_batch_tokens,
                max_rollout_tokens=max_rollout_tokens,
                gradient_checkpointing=checkpointing,
            )
            with mock.patch.object(common, "CHUNK_LOGITS", 64 * config.vocab_size):  # several chunks a micro-batch
                yield f"{name}{', checkpointing' * checkpointing}", plan(config, args), measure(config, args)


def main():
    args = common.parse(common.RunArgs, {})
    shapes = SHAPES if args.model == "embedded" else {args.model: AutoConfig.from_pretrained(args.model)}
    print_table((name, plan(config, args)) for name, config in shapes.items())
    print("\nplanned / measured, small models on the CPU (aim: within 15%)")
    for name, planned, measured in checks():
        ratios = (f"{planned[c] / measured[c]:12.2f}" for c in COMPONENTS)
        print(name.ljust(38) + "".join(ratios) + f"   of {measured['total'] * 1024:.1f} MiB")


if __name__ == "__main__":
    with common.one_line_errors():
        main()
