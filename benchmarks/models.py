"""What the benchmarks measure with: models with random weights, and rollouts of random tokens. Not a script."""

from unittest import mock

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import common


def qwen3(D, intermediate, L, heads, kv_heads, V=151936, head_dim=128, tied=True):
    """A Qwen3 configuration of this shape."""
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


EMBEDDED = qwen3(80, 240, 8, 5, 5, V=103, head_dim=16, tied=False)  # the shape of the model that sft.py builds

SHAPES = {
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, 8),
    "Qwen3-1.7B": qwen3(2048, 6144, 28, 16, 8),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, 8),
    "Qwen3-8B": qwen3(4096, 12288, 36, 32, 8, tied=False),
}


def random_model(config, device="cpu", dtype=torch.float32, seed=0):
    """A model of this shape with random weights, made on the device itself, in evaluation mode."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_tokens(V, lengths, generator=None):
    """One list of random token ids for each length."""
    return [torch.randint(V, (n,), generator=generator).tolist() for n in lengths]


def random_rollouts(V, prompts, completions, device="cpu"):
    """Rollouts of random tokens. prompts, completions: the lengths of both, row by row."""
    generator = torch.Generator().manual_seed(0)
    prompts = random_tokens(V, prompts, generator)
    completions = random_tokens(V, completions, generator)
    return common.assemble(prompts, completions, 0, device)


def blank_tokenizer(end=None, pad=0):
    """As much of a tokenizer as sampling from token ids needs; it has no end token unless one is given."""
    return mock.Mock(eos_token_id=end, pad_token_id=pad)
