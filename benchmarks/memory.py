"""What a training run takes of the GPU's memory, planned from a model's config before anything is loaded.

`plan` counts by hand what training keeps alive at its fullest moments, component by component. The script prints it for
four Qwen3 shapes under the training defaults, or under the options given (those of every training script). With --check
it compares the plan with the bytes of live tensors instead, on small CPU models, with and without gradient
checkpointing and a critic: every component and the total must agree within 15%, or the exit status is 1. A minute.

    python benchmarks/memory.py
    python benchmarks/memory.py --micro_batch_tokens 32768 --optimizer_device cpu
    python benchmarks/memory.py --model path/to/model
    python benchmarks/memory.py --critic                     # for ppo.py
    python benchmarks/memory.py --gpus 8                     # of each of 8 GPUs; not compared with anything yet
    python benchmarks/memory.py --check
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # imports start at the root of the repository

import common
import ppo
from benchmarks.meters import peak_bytes
from benchmarks.models import SHAPES, blank_tokenizer, qwen3, random_model, random_rollouts
from plumbing import precision
from plumbing.errors import one_line_errors
from plumbing.models import give_value_head
from plumbing.optimizer import Optimizer
from plumbing.options import RunArgs, option, parse

GIB = 2**30
CARDS = (24, 48, 80, 141)  # GB of memory, 10^9 bytes
COMPONENTS = ("weights", "gradients", "optimizer", "activations", "head", "cache", "total")
OF_SEVERAL = ("shares", "gradients", "optimizer", "gathered", "activations", "head", "cache", "total")
TOLERANCE = 0.15


@dataclass
class Args(RunArgs):
    check: bool = option(False, "compare the plan with live tensors of small models, instead of printing it")
    only: str = option("", "with --check: small models whose names hold this")
    critic: bool = option(False, "plan for a critic, too: a second network of this shape, trained beside the first")
    gpus: int = option(1, "GPUs that train one model together, by torchrun; the plan is that of each", above=0)


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


def plan(config, args):
    """GiB on the device by component, for a Qwen3-like config and the options of a training run (Args).

    Sampling and training take turns, as do blocks and head: `total` is weights, optimizer and the fullest moment.
    """
    s = 4 if args.dtype == "float32" else 2  # bytes of a weight, a gradient, an activation
    with torch.device("meta"):  # the very model, without its memory
        sizes = [p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()]
    tokens = max(longest_sequence(args), args.micro_batch_tokens)  # of a micro-batch, all completion at worst

    parameters = trained_parameters(config, sizes, args)
    weights = gradients = parameters * s
    optimizer = 0
    update = 0
    if args.optimizer_device != "cpu":
        optimizer = parameters * (8 if s == 4 else 12)  # fp32 weights are their own masters
    if s != 4:
        update = 4 * max(sizes)  # one gradient at a time in fp32
    activations, head, one_pass = pass_memory(config, s, tokens, args)
    cache = sampling_memory(config, s, args)
    training = gradients + max(one_pass, update)
    total = weights + optimizer + max(cache, training)
    figures = (weights, gradients, optimizer, activations, head, cache, total)
    return {name: figure / GIB for name, figure in zip(COMPONENTS, figures)}


def plan_of_several(config, args):
    """What `plan` tells, of each of args.gpus: shares of the weights, which are masters, and of gradients and moments,
    all fp32; and beside them what is gathered.

    While sampling that is the whole model. In training it is what lies in no block (embedding, head, final norm), the
    block that runs, the next one, the gradient of a block, and that gradient once more in fp32, on its way to the
    others.
    """
    s = 4 if args.dtype == "float32" else 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = [p.numel() for p in model.parameters()]
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = sum(sizes) - config.num_hidden_layers * block
    share = trained_parameters(config, sizes, args) / args.gpus
    gathered = s * sum(sizes)
    gathered_to_train = s * (outside + 3 * block) + 4 * max(outside, block)
    tokens = max(longest_sequence(args), args.micro_batch_tokens)
    activations, head, one_pass = pass_memory(config, s, tokens, args)
    cache = sampling_memory(config, s, args)
    total = 12 * share + max(gathered + cache, 4 * share + gathered_to_train + one_pass)
    figures = (4 * share, 4 * share, 8 * share, gathered, activations, head, cache, total)
    return {name: figure / GIB for name, figure in zip(OF_SEVERAL, figures)}


def trained_parameters(config, sizes, args):
    """How many weights have a gradient. sizes: of the model's parameters."""
    parameters = sum(sizes)
    if args.critic:  # its gradients wait beside the policy's; the two take turns with everything else
        parameters += sum(sizes) + config.hidden_size
        if not config.tie_word_embeddings:
            parameters -= config.vocab_size * config.hidden_size
    return parameters


def pass_memory(config, s, tokens, args):
    """Bytes of a micro-batch: (activations of the blocks, head, the fullest moment of forward and backward pass)."""
    kept, block = activations_per_token(config, s, args.gradient_checkpointing)
    activations = tokens * (kept + block)
    head = head_memory(config, s, tokens)
    # While the head runs there are also the final norm, and the completion's states picked from it.
    D = config.hidden_size
    under_head = tokens * (kept + norm_per_token(D, s) + s * D)
    waiting = 0
    if config.tie_word_embeddings:
        waiting = config.vocab_size * D * s  # the head's gradient waits for the embedding's
    return activations, head, max(activations + waiting, under_head + head)


def longest_sequence(args):
    return args.max_prompt_length + args.max_completion_length


def widths_of_attention(config):
    """(queries of all heads, keys of all heads, one head)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim, head_dim


def norm_per_token(D, s):
    """A norm keeps its input in fp32 and the normalised one; its output is what the next product keeps."""
    return (4 + 2 * s) * D


def activations_per_token(config, s, checkpointing):
    """Bytes (kept for the backward pass by all the blocks, alive during the backward pass of one of them)."""
    D, intermediate, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    Q, K, head_dim = widths_of_attention(config)
    norm = norm_per_token(D, s)
    # Attention: two norms of heads; queries, outputs, keys and values.
    attention = norm + (4 + s) * (Q + K) + 2 * s * (Q + K) + 4 * config.num_attention_heads
    if s == 4:
        attention -= 4 * D  # the first norm's input is the block's, counted below
    mlp = norm + 4 * s * intermediate  # gate, its SiLU, up, their product
    kept = L * s * D + 2 * s * head_dim  # every block's input; sines and cosines
    block = 2 * s * (intermediate + D)  # two gradients as wide as the MLP; the stream and its gradient
    if checkpointing:
        block += attention + mlp  # recomputed
    else:
        kept += L * (attention + mlp)
    return kept, block


def head_memory(config, s, tokens):
    """Bytes during the backward pass through a chunk of the head.

    Log-probs and two gradients like them, in fp32, beside the matrix's gradient of the chunks before; or that gradient,
    this chunk's and their sum. The states' gradient, in pieces and in one.
    """
    V, D = config.vocab_size, config.hidden_size
    matrix = V * D * s
    chunk = 4 * V * min(tokens, max(1, common.CHUNK_LOGITS // V))
    return matrix + max(3 * chunk, 2 * matrix) + 2 * s * D * tokens


def sampling_memory(config, s, args):
    """Bytes of a wave's keys and values, and beside them those of a layer that are just moving to a larger place, or at
    the head log-probs and probabilities in fp32 and the sums of these in fp64."""
    longest = longest_sequence(args)
    rows = max(1, args.max_rollout_tokens // longest)
    _, K, _ = widths_of_attention(config)
    layer = 2 * K * s * rows * longest
    return config.num_hidden_layers * layer + max(layer // 2, (4 + 4 + 8) * rows * config.vocab_size)


def print_plan(name, figures):
    """One line. What fits a card must leave 5% of it to the allocator and the CUDA context."""
    fits = [str(card) for card in CARDS if figures["total"] * GIB <= 0.95e9 * card]
    columns = "".join(f"{figure:12.2f}" for figure in figures.values())
    print(name.ljust(38) + columns + f"   {' '.join(fits) or 'none'}")


# ---------------------------------------------------------------------------------------------------------------------
# The check
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Small:
    """A model of the check; its longest sequence, and the tokens of a micro-batch and of a wave."""

    config: PretrainedConfig
    dtype: str
    longest: int
    micro_batch_tokens: int
    max_rollout_tokens: int
    critic: bool = False


SMALL = {
    "wide, tied, bf16": Small(qwen3(256, 768, 4, 8, 4, V=2000, head_dim=32), "bfloat16", 48, 384, 1536),
    "deep, untied": Small(qwen3(96, 288, 8, 6, 2, V=1000, head_dim=16, tied=False), "float32", 48, 384, 768),
    "deep, untied, critic": Small(
        qwen3(96, 288, 8, 6, 2, V=1000, head_dim=16, tied=False), "float32", 48, 384, 768, critic=True
    ),
    "large vocabulary, tied": Small(qwen3(64, 192, 6, 4, 2, V=8000, head_dim=16), "float32", 32, 256, 1024),
}


def distinct_bytes(tensors):
    """Bytes of these tensors' memory; what two of them share counts once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


class Measured:
    """A small model and its training, piece by piece, for `measure`."""

    def __init__(self, config, args):
        self.args = args
        self.model = random_model(config, dtype=getattr(torch, args.dtype))
        self.model.generation_config.eos_token_id = None
        if args.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.optimizers = [Optimizer(self.model, args)]
        self.parameters = list(self.model.parameters())
        if args.critic:
            self.critic = random_model(config, dtype=getattr(torch, args.dtype))
            give_value_head(self.critic)
            if args.gradient_checkpointing:
                self.critic.activation_checkpointing_enable({"use_reentrant": False})
            self.critic.train()
            self.optimizers.append(Optimizer(self.critic, args))
            self.parameters.extend(self.critic.parameters())
        longest = longest_sequence(args)
        self.full = args.micro_batch_tokens // longest  # rows of a micro-batch
        lengths = [longest - 1 - i % 2 for i in range(2 * self.full)]  # not all the same: batches are padded
        self.batch = random_rollouts(config.vocab_size, [1] * len(lengths), lengths)

    def sample(self):
        args = self.args
        first = self.batch.ids[0].tolist()
        ragged = [first[: args.max_prompt_length], first[: args.max_prompt_length - 1]]
        n = args.max_rollout_tokens // longest_sequence(args) // len(ragged)
        limits = (args.max_completion_length, 1.0, args.max_rollout_tokens)
        common.sample(self.model, blank_tokenizer(), ragged, n, *limits)

    def blocks(self):
        ids = self.batch.ids[: self.full]
        hidden = common.hidden_states(self.model, ids, self.batch.attention_mask[: self.full])
        hidden.backward(torch.ones_like(hidden))

    def head(self):
        n = self.args.micro_batch_tokens
        hidden = torch.randn(1, n, self.model.config.hidden_size, dtype=self.model.dtype, requires_grad=True)
        logps = common.token_logps(self.model, hidden, torch.zeros(1, n, dtype=torch.long))[0]
        logps.sum().backward()

    def train(self):
        for rows in common.micro_batches(self.batch, range(2 * self.full), self.args.micro_batch_tokens):
            logps = common.completion_logps(self.model, self.batch, rows, 1.0)[0]  # entropies would hold their graph
            logps.sum().backward()
            if self.args.critic:
                ppo.completion_values(self.critic, self.batch, rows).sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def optimizer_tensors(self):
        tensors = []
        for optimizer in self.optimizers:
            for state in optimizer.state_dict().values():
                tensors.append(state["master"])
                tensors.extend(state["adam"]["state"][0].values())
        return tensors


def measure(config, args):
    """The components of `plan`, counted in live tensors while the library's functions run."""
    run = Measured(config, args)
    run.train()  # the optimizer's state exists from here on
    parameters = run.parameters
    weights = distinct_bytes(parameters)
    resident = distinct_bytes([*parameters, *run.optimizer_tensors()])
    sampling = peak_bytes(run.sample)
    total = resident + max(sampling, peak_bytes(run.train))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # of an earlier micro-batch
    gradients = distinct_bytes(parameter.grad for parameter in parameters)
    activations = peak_bytes(run.blocks)
    head = peak_bytes(run.head)
    figures = (weights, gradients, resident - weights, activations, head, sampling, total)
    return {name: figure / GIB for name, figure in zip(COMPONENTS, figures)}


class ProductOnCuda(precision.FP32Product):
    """A bf16 head's product as it lies in the memory of a GPU; on a CPU its factors are copied to fp32 first. What the
    logits are does not matter here."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return torch.zeros(len(hidden), len(weight))


def product_on_cuda(hidden, weight):
    if hidden.dtype == torch.bfloat16:
        return ProductOnCuda.apply(hidden, weight)
    return precision.fp32_product(hidden, weight)


def checks(only):
    """Yield (name, planned, measured) for small models whose names hold `only`, with and without checkpointing."""
    for name, small in SMALL.items():
        if only not in name:
            continue
        for ending, checkpointing in ((", checkpointing", True), ("", False)):
            args = Args(
                critic=small.critic,
                dtype=small.dtype,
                max_prompt_length=small.longest - small.longest // 4,
                max_completion_length=small.longest // 4,
                micro_batch_tokens=small.micro_batch_tokens,
                max_rollout_tokens=small.max_rollout_tokens,
                gradient_checkpointing=checkpointing,
            )
            chunk = 64 * small.config.vocab_size  # several chunks a micro-batch
            with mock.patch.multiple(common, CHUNK_LOGITS=chunk, fp32_product=product_on_cuda):
                yield name + ending, plan(small.config, args), measure(small.config, args)


def check(only):
    """Print planned / measured -> how many of these ratios are off by more than the tolerance."""
    wrong = 0
    print("planned / measured, small models on the CPU (aim: within 15%)")
    for name, planned, measured in checks(only):
        ratios = [planned[component] / measured[component] for component in COMPONENTS]
        wrong += sum(abs(ratio - 1) > TOLERANCE for ratio in ratios)
        columns = "".join(f"{ratio:12.2f}" for ratio in ratios)
        print(name.ljust(38) + columns + f"   of {measured['total'] * 1024:.1f} MiB")
    return wrong


def main():
    args = parse(Args, {})
    if args.check:
        sys.exit(1 if check(args.only) else 0)
    shapes = SHAPES
    if args.model != "embedded":
        shapes = {args.model: AutoConfig.from_pretrained(args.model)}
    components = COMPONENTS if args.gpus == 1 else OF_SEVERAL
    print("GiB".ljust(38) + "".join(name.rjust(12) for name in components) + "   fits GB")
    for name, config in shapes.items():
        print_plan(name, plan(config, args) if args.gpus == 1 else plan_of_several(config, args))


if __name__ == "__main__":
    with one_line_errors():
        main()
