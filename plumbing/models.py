"""Models and their tokenizers: loading, checking, and turning prompts into tokens."""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from plumbing import sharding
from plumbing.errors import UserError, explain
from plumbing.options import EMBEDDED_MODEL

transformers_logging.disable_progress_bar()

# cuDNN's attention plans every new shape anew, and while sampling each step is one: 128 against 36 ms a token
# (Qwen3-1.7B, 512 rows, H200). The other kernels of scaled_dot_product_attention need no plan.
torch.backends.cuda.enable_cudnn_sdp(False)

LISTED = 9  # of many faulty problems, so many are named

TEMPLATE_SECONDS = 10  # that a chat template may take for one prompt: it is a program, and may loop

# Parameters, below which a model on the CPU runs on one thread: a product is over before a second thread has begun. The
# number is a guess; `python benchmarks/threads.py` compares the ways to run the embedded size.
SMALL = 2 * 10**6

# Kinds of blocks that the sampler's cache can serve. Others, as in hybrids with linear attention, keep a state instead.
KEEPS_KEYS_AND_VALUES = ("full_attention", "sliding_attention")

# Rotary embeddings that see the longest row of a batch. While sampling, keys were turned when rows were still short;
# training turns them all at the final length. So what is trained is not what was sampled: by 2 to 3 nats, as seen.
DEPENDS_ON_LENGTH = ("dynamic", "longrope")


def load_model(path, device="auto", dtype="auto", trained=False):
    """(model, tokenizer) from a local folder or hub id, in evaluation mode. Safetensors only, no remote code.

    path 'embedded': the embedded model. device 'auto': cuda if there is one. dtype 'auto': bfloat16 on cuda, float32 on
    cpu. trained: several processes keep fp32 shares of the weights, see sharding.py. Raises UserError.
    """
    device = chosen_device(device)
    model, tokenizer = read_model(path, device, dtype)
    with explain(f"--device {device}: the model cannot go there", "choose another device"):
        sharding.place(model, device, trained)
    spare_threads(model)
    return model, tokenizer


def chosen_device(device):
    """The device that 'auto' stands for: cuda if there is one. Any other stands for itself."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def read_model(path, device, dtype):
    """What `load_model` gives, still in host memory. device: where it will go. Raises UserError."""
    folder = EMBEDDED_MODEL if path == "embedded" else Path(path)
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if folder.is_file():
        raise UserError(f"--model {folder}: is a file; pass the folder of a model")
    if folder.is_dir() and not holds_tokenizer(folder):
        raise UserError(f"--model {folder}: no tokenizer in this folder; put one there with tokenizer.save_pretrained")
    # What can fail here: a folder that is missing, cut off or of an unknown kind, and the network.
    remedy = "check name and network"
    if folder.is_dir():
        remedy = "files are missing, damaged or of another kind; take another checkpoint, or download it again"
    with explain(f"--model {folder}: cannot be loaded", remedy):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,  # left out, transformers would ask, and run the folder's code on a 'y'
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    backbone_of(model)  # refuses other architectures
    refuse_incomplete(folder, model, tokenizer, loaded)
    if device.startswith("meta"):
        raise UserError(f"--device {device}: holds shapes and no numbers; choose another device")
    replace_invalid_generation_config(model)
    switch_dropout_off(model)
    return model.eval(), tokenizer


def spare_threads(model):
    """Let torch use one thread from here on, if the model is small and on the CPU. So a busy machine, and one of many
    cores, do not slow it down, and its numbers do not depend on the number of cores. OMP_NUM_THREADS, if set, rules."""
    if "OMP_NUM_THREADS" in os.environ or model.device.type != "cpu":
        return
    if model.num_parameters() < SMALL:
        torch.set_num_threads(1)


def load_critic(args):
    """The model that load_model gives, with a head of one row in place of its unembedding: the value of a state. At
    first that is 0 everywhere. Reads args.model, device, dtype, gradient_checkpointing."""
    device = chosen_device(args.device)
    critic, _ = read_model(args.model, device, args.dtype)
    give_value_head(critic)
    sharding.place(critic, device, trained=True)
    if args.gradient_checkpointing:
        critic.activation_checkpointing_enable({"use_reentrant": False})
    return critic


def give_value_head(model):
    """Replace the unembedding by one row of zeros; it is no longer tied to the embedding, which stays."""
    embedding = model.get_input_embeddings().weight
    head = torch.nn.Linear(embedding.shape[1], 1, bias=False, device=embedding.device, dtype=embedding.dtype)
    torch.nn.init.zeros_(head.weight)
    model.set_output_embeddings(head)


def refuse_incomplete(folder, model, tokenizer, loaded):
    """Raise UserError for weights that are not those of the model: where one is missing, transformers takes a random
    one and goes on. loaded: transformers' account of what it found."""
    remedy = "take the whole checkpoint of a causal language model"
    wrong = {kind: list(loaded[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    wrong["mismatched"] = [name for name, *_ in wrong["mismatched"]]  # beside their shapes
    for kind, names in wrong.items():
        names.sort()
        if names:
            raise UserError(f"--model {folder}: {len(names)} {kind} weights, {names[0]} for one; {remedy}")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"--model {folder}: {name} holds weights that are no finite numbers; {remedy}")
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        remedy = "resize the embedding, or take the model's own tokenizer"
        raise UserError(f"--model {folder}: its tokenizer has token {largest}, its embedding {rows} rows; {remedy}")
    if not end_token_ids(model, tokenizer):
        raise UserError(f"--model {folder}: no token ends an answer; set eos_token in its tokenizer_config.json")


def holds_tokenizer(folder):
    """True if a local folder holds a tokenizer's files."""
    return any(folder.glob("token*.*")) or any(folder.glob("vocab.*"))


def backbone_of(model):
    """The decoder below the head, with `layers` (blocks) and `norm` (final). Raises UserError naming the class."""
    name = type(model).__name__
    backbone = getattr(model, "model", None)
    for part in ("layers", "norm", "embed_tokens"):
        if not hasattr(backbone, part):
            raise UserError(f"{name}: no model.layers and model.norm; use a Qwen or Llama-like model")
    for setting in ("logits_scaling", "logit_scale", "final_logit_softcapping"):
        if getattr(model.config, setting, None) not in (None, 1, 1.0):
            raise UserError(f"{name}: bends its logits ({setting}); use a Qwen or Llama-like model")
    for layer_type in getattr(model.config, "layer_types", None) or []:
        if layer_type not in KEEPS_KEYS_AND_VALUES:
            raise UserError(f"{name}: a block of {layer_type} keeps no keys and values; use a Qwen or Llama-like model")
    for kind in rope_types(model.config):
        if kind in DEPENDS_ON_LENGTH:
            remedy = "take a model without it, or change it in config.json"
            raise UserError(f"{name}: rope_type {kind} depends on the longest row of a batch; {remedy}")
    return backbone


def shape_of(model):
    """What two models must share for the stream of one to fit into the other, or to be compared with it."""
    return {
        "number of blocks": len(backbone_of(model).layers),
        "width": model.config.hidden_size,
        "vocabulary": model.config.vocab_size,
    }


def refuse_other_shape(path, shape, first_path, first_shape):
    """Raise UserError unless two models have the same `shape_of`."""
    for what, size in shape.items():
        first_size = first_shape[what]
        if size != first_size:
            raise UserError(
                f"{path}: its {what} is {size}, that of {first_path} {first_size}; take models of one shape"
            )


def rope_types(config):
    """Kinds of rotary position embedding that a model has: a list, of one kind for most models."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    return [settings.get("rope_type") for settings in (parameters, *by_layer_type)]


def replace_invalid_generation_config(model):
    """Give a model whose generation_config save_pretrained would refuse (top_p beside do_sample=False, say) a plain
    one: better now than after training. Nothing here samples by it; only its end tokens are read."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)


def switch_dropout_off(model):
    """Set every dropout to 0: it would make sampler, old policy and new policy three different ones."""
    for module in model.modules():
        for name in ("p", "attention_dropout"):
            if name in vars(module):
                setattr(module, name, 0.0)


def end_token_ids(model, tokenizer):
    """Sorted list of every token that ends an answer: generation_config's (one or a list) and the tokenizer's."""
    ids = model.generation_config.eos_token_id
    if not isinstance(ids, list):
        ids = [ids]
    return sorted({*ids, tokenizer.eos_token_id} - {None})


def encode(tokenizer, prompt, chat_template_kwargs=None):
    """Prompt (text, chat messages, or token ids, which pass through) -> list of token ids with at most one BOS.

    One tokenization, straight from the chat template: rendering to text first would add a second BOS. A tokenizer
    without template gets the plain contents, paragraph by paragraph, with its own special tokens.
    """
    if not isinstance(prompt, str) and isinstance(prompt[0], int):
        return list(prompt)
    if tokenizer.chat_template:
        messages = prompt
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        settings = dict(tokenize=True, add_generation_prompt=True, return_dict=False)
        if chat_template_kwargs:
            settings.update(chat_template_kwargs)
        ids = tokenizer.apply_chat_template(messages, **settings)
    else:
        ids = tokenizer(plain_text(prompt))["input_ids"]
    has_two_bos = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
    if has_two_bos:
        ids = ids[1:]
    return list(ids)


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TimeoutError in what runs inside for longer. Only in the main thread, which alone gets signals."""

    def stop(number, frame):
        raise TimeoutError(f"takes longer than {seconds} seconds")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def plain_text(prompt):
    """A prompt for a tokenizer without chat template: its contents, paragraph by paragraph."""
    if isinstance(prompt, str):
        return prompt
    paragraphs = [message["content"] for message in prompt]
    return "\n\n".join(paragraphs) + "\n\n"


def tokenize_problems(tokenizer, problems, max_prompt_length, chat_template_kwargs=None):
    """Set `ids` of every problem; drop and list those over max_prompt_length. Raises UserError if none is left."""
    remedy = "mend the messages or --chat_template_kwargs, or try --system_prompt ''"
    kept = []
    dropped = []
    for problem in problems:
        with explain(f"{problem.where}: the chat template refuses it", remedy), time_limit(TEMPLATE_SECONDS):
            problem.ids = encode(tokenizer, problem.prompt, chat_template_kwargs)
        if len(problem.ids) <= max_prompt_length:
            kept.append(problem)
        else:
            dropped.append(f"{problem.where} ({len(problem.ids)} tokens)")
    if not kept:
        example = dropped[0]
        raise UserError(f"--max_prompt_length {max_prompt_length}: every prompt is longer, {example} for one; raise it")
    if dropped:
        names = ", ".join(dropped[:LISTED])
        print(f"dropped {len(dropped)} prompts over --max_prompt_length: {names}", file=sys.stderr)
    return kept
