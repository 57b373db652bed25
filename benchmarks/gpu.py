"""Speed and memory on one GPU, for models of Qwen3 shapes with random weights, made on the device in bf16.

Sampling by the library's loop, with cuDNN's attention switched on, too, and by transformers' continuous batching, under
the same rules (temperature 1, the whole vocabulary, no end token); training with gradient checkpointing, on sequences
of equal and of ragged lengths; the plan of benchmarks/memory.py beside the measured peaks; the passes of phase one
(block 5) against their budget; the optimizer beside the weights and on the host. Each figure is printed once it is
there, all of them as a Markdown table at the end. What fails or takes too long leaves its reason in the table. Some ten
minutes for all three; without a GPU, one line.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --models Qwen3-4B --limit 200
"""

import argparse
import datetime
import gc
import os
import signal
import sys
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # imports start at the root of the repository

import common
from benchmarks.memory import GIB, plan
from benchmarks.meters import seconds
from benchmarks.models import SHAPES, blank_tokenizer, random_model, random_rollouts, random_tokens
from benchmarks.phase_one import phase_one
from plumbing.optimizer import Optimizer
from plumbing.options import RunArgs

PROMPTS, SAMPLES, NEW_TOKENS = range(64, 192, 2), 8, 256  # prompt lengths; completions of each; their tokens
ROWS, PROMPT, COMPLETION, MICRO_BATCH_TOKENS = 32, 128, 1920, 2**14  # of a training step; the longest completion
LAYER = 5


def matrix_rate(device, n=8192):
    """Measured bf16 matrix products, in 10^12 operations per second."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    seconds(lambda: [a @ b for _ in range(3)])  # warms up
    return 2 * n**3 * 10 / seconds(lambda: [a @ b for _ in range(10)]) / 1e12


def training_flops(config, rollouts):
    """Operations of forward and backward, recomputation left out: two per weight and token forward, four backward."""
    D, L = config.hidden_size, config.num_hidden_layers
    Q = config.num_attention_heads * config.head_dim
    K = config.num_key_value_heads * config.head_dim
    block = 2 * D * (Q + K) + 3 * D * config.intermediate_size
    lengths = rollouts.attention_mask.sum(1).double()
    pairs = float((lengths**2).sum()) / 2  # of a query and a key not after it: one product for its score, one for it
    head = D * config.vocab_size * float(rollouts.lengths.sum())
    return 6 * (L * block * float(lengths.sum()) + head + 2 * L * Q * pairs)


def peak_gib(device):
    """Most memory allocated since the last call."""
    peak = torch.cuda.max_memory_allocated(device) / GIB
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def against_plan(measured, planned):
    return f"{measured:.1f} ({planned:.1f})"


# ---------------------------------------------------------------------------------------------------------------------
# Measurements: (model, rate) -> {label: text}
# ---------------------------------------------------------------------------------------------------------------------


def random_prompts(model):
    return random_tokens(model.config.vocab_size, PROMPTS, torch.Generator().manual_seed(0))


def sampling(model, rate):
    """The library's own loop."""
    prompts = random_prompts(model)
    tokenizer = blank_tokenizer()
    common.sample(model, tokenizer, prompts, SAMPLES, 8)  # warms up
    before = torch.cuda.memory_allocated(model.device) / GIB
    peak_gib(model.device)
    time = seconds(lambda: common.sample(model, tokenizer, prompts, SAMPLES, NEW_TOKENS))
    peak = peak_gib(model.device) - before
    rows = len(prompts) * SAMPLES
    args = RunArgs(
        max_prompt_length=max(PROMPTS),
        max_completion_length=NEW_TOKENS,
        max_rollout_tokens=min(2**18, rows * (max(PROMPTS) + NEW_TOKENS)),  # at most the default: that bounds a wave
    )
    return {
        "sampling, common.sample: tokens/s": f"{rows * NEW_TOKENS / time:.0f}",
        "its cache and logits: GiB (planned)": against_plan(peak, plan(model.config, args)["cache"]),
    }


def cudnn_attention(model, rate):
    """What switching that kernel off is worth (plumbing/models.py)."""
    prompts = random_prompts(model)
    tokenizer = blank_tokenizer()
    times = []
    try:
        for enabled in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            times.append(seconds(lambda: common.sample(model, tokenizer, prompts, SAMPLES, NEW_TOKENS // 8)))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)
    return {"sampling with cuDNN's attention: times as slow": f"{times[1] / times[0]:.1f}"}


def continuous_batching(model, rate):
    """transformers' generate_batch; its start-up, timed by a run of one token, is told apart."""
    # Prompts repeated: of num_return_sequences, transformers 5.17 hands back one sample per prompt only.
    prompts = [prompt for prompt in random_prompts(model) for _ in range(SAMPLES)]
    implementation = model.config._attn_implementation
    model.eval()
    try:
        short = time_of_generate_batch(model, prompts, 1)
        long = time_of_generate_batch(model, prompts, NEW_TOKENS)
    finally:
        model.train().set_attn_implementation(implementation)  # it leaves its own behind
    tokens = len(prompts) * NEW_TOKENS
    return {
        "sampling, generate_batch: tokens/s": f"{tokens / long:.0f}",
        "the same without start-up": f"{tokens * (1 - 1 / NEW_TOKENS) / (long - short):.0f}",
    }


def time_of_generate_batch(model, prompts, n):
    """Seconds for n tokens behind every prompt."""
    rules = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=n, eos_token_id=-1)
    outputs = {}
    time = seconds(lambda: outputs.update(model.generate_batch(prompts, generation_config=GenerationConfig(**rules))))
    sampled = sum(len(output.generated_tokens) for output in outputs.values())
    wanted = n * len(prompts)
    if sampled < wanted:  # it swallows the exceptions of its own thread, and the alarm
        raise RuntimeError(f"gave {sampled} of {wanted} tokens after {time:.0f} s")
    return time


def training(model, rate):
    """Log-probs and backward of every micro-batch, then the optimizer's step."""
    figures = {}
    optimizer = Optimizer(model, RunArgs())
    for name, shortest in (("equal", COMPLETION), ("ragged", COMPLETION // 4)):
        completions = torch.linspace(shortest, COMPLETION, ROWS).int().tolist()
        rollouts = random_rollouts(model.config.vocab_size, [PROMPT] * ROWS, completions, model.device)

        def step(rollouts=rollouts):
            for rows in common.micro_batches(rollouts, range(ROWS), MICRO_BATCH_TOKENS):
                logps = common.completion_logps(model, rollouts, rows, 1.0)[0]  # entropies would hold their graph
                (logps.sum() / ROWS).backward()
            optimizer.step()

        step()  # warms up
        time = min(seconds(step) for _ in range(2))
        flops = training_flops(model.config, rollouts) / time / 1e12
        figures[f"training, {name} lengths: tokens/s"] = f"{int(rollouts.attention_mask.sum()) / time:.0f}"
        figures[f"  of the measured bf16 rate, {name}"] = f"{flops / rate:.0%}"
        if name == "equal":
            peak_gib(model.device)  # its activations are not those of the padded batches that the plan is for
    args = RunArgs(
        max_prompt_length=PROMPT,
        max_completion_length=COMPLETION,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        max_rollout_tokens=1,  # nothing is sampled here
    )
    planned = plan(model.config, args)["total"]
    figures["training, peak: GiB (planned)"] = against_plan(peak_gib(model.device), planned)
    return figures


def internal_step(model, rate):
    """Old-log-prob and update passes of a step of phase one."""
    completions = torch.linspace(COMPLETION // 4, COMPLETION, ROWS // 2).int().tolist()
    rollouts = random_rollouts(model.config.vocab_size, [PROMPT] * len(completions), completions, model.device)
    full, head, internal = phase_one(model, rollouts, MICRO_BATCH_TOKENS, [LAYER], rounds=3)
    time, budget = internal[LAYER]
    return {
        f"phase one, block {LAYER}: share of a full step's passes": f"{time / full:.2f}",
        "  / ((k+1)/L blocks + head), aim 1.15": f"{time / budget:.2f}",
        "  head's share of a full step's passes": f"{head / full:.2f}",
    }


def optimizers(model, rate):
    """A step's time, beside the weights and with masters and moments in host memory."""
    figures = {}
    for device, place in (("", "the GPU"), ("cpu", "the host")):
        optimizer = Optimizer(model, RunArgs(optimizer_device=device))
        for _ in range(2):  # the first one makes the moments
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 1e-3)
            time = seconds(optimizer.step)
        figures[f"optimizer step on {place}: s"] = f"{time:.3f}"
    return figures


MEASUREMENTS = (sampling, cudnn_attention, training, internal_step, optimizers, continuous_batching)

# ---------------------------------------------------------------------------------------------------------------------


def attempt(measurement, limit, model, rate):
    """Its figures, or why there are none. The alarm ends what takes longer than `limit` seconds."""

    def stop(*_):
        raise TimeoutError(f"over {limit} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        return measurement(model, rate)
    except Exception as error:  # of any kind: the other figures are still wanted
        return {measurement.__name__: f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
    finally:
        signal.alarm(0)
        model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()


def measure(model, rate, limit):
    """All figures of a model, {label: text}, printed one by one."""
    model.generation_config.eos_token_id = None
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    figures = {}
    for measurement in MEASUREMENTS:
        found = attempt(measurement, limit, model, rate)
        for label, text in found.items():
            print(f"  {label:52} {text}", flush=True)
        figures.update(found)
    return figures


def table(columns):
    """{model: {label: text}} -> the lines of a Markdown table; a figure that a model lacks stays empty."""
    labels = list(dict.fromkeys(label for figures in columns.values() for label in figures))
    yield f"| | {' | '.join(columns)} |"
    yield "|---|" + "---|" * len(columns)
    for label in labels:
        texts = [figures.get(label, "") for figures in columns.values()]
        yield f"| {label.strip()} | {' | '.join(texts)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES)[:3], help="shapes to measure")
    parser.add_argument("--limit", type=int, default=75, help="seconds after which a measurement is given up")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing measured")
        return
    torch.set_num_threads(os.cpu_count())  # the optimizer on the host wants all
    device = torch.device("cuda")
    rate = matrix_rate(device)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    title = f"{datetime.date.today()}, {torch.cuda.get_device_name()}, {versions}, bf16 products {rate:.0f} TFLOP/s"
    print(title, flush=True)
    columns = {}
    for name in args.models:
        print(name, flush=True)
        model = random_model(SHAPES[name], device, torch.bfloat16)
        columns[name] = measure(model, rate, args.limit)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    print("", title, "", *table(columns), sep="\n")


if __name__ == "__main__":
    main()
