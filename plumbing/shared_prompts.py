"""The backbone's forward pass over completions of shared prompts: every prompt is read once, not once per completion.

The G completions of a prompt see the same keys and values in its place. Where prompts are longer than answers, as with
a chat template and short answers, most of a forward and backward pass goes into reading the same prompt G times.
"""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from plumbing import distributed

SAVES = 0.25  # share of the tokens that must be saved: below it two passes cost more than one
PARTS = 4  # the completions are read in so many parts, short ones with short ones


def saves_tokens(model, ids, attention_mask, prompt_lengths):
    """Whether to read prompts once is possible, exact and worth while. Arguments as in `read_prompts_once`.

    Not on a GPU, whose fastest kernels take no mask. Not with gradient checkpointing, which drops the cache. Not where
    a block keeps something else than all keys and values. Not with several processes: each decides by its own rows, but
    all must run a block equally often.
    """
    if ids.is_cuda or distributed.count() > 1 or (model.training and model.is_activation_checkpointing):
        return False
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) is not DynamicLayer:
            return False
    unique = set(prompts_of(ids, prompt_lengths))
    read_twice = sum(prompt_lengths) - sum(len(prompt) for prompt in unique)
    return read_twice > SAVES * attention_mask.sum().item()


def prompts_of(ids, prompt_lengths):
    """The prompt of every row of ids [B, T], as a tuple of token ids."""
    rows = ids.tolist()
    return [tuple(row[:length]) for row, length in zip(rows, prompt_lengths)]


def read_prompts_once(backbone, ids, attention_mask, prompt_lengths):
    """What backbone(ids).last_hidden_state is, [B, T, D], up to rounding, and 0 on padding. Differentiable.

    ids, attention_mask [B, T]: prompt, completion, padding on the right; prompt_lengths: a list of B.
    """
    lengths = attention_mask.sum(1).tolist()
    prompts = prompts_of(ids, prompt_lengths)
    places = {}  # prompt -> its place among the different ones
    for prompt in prompts:
        places.setdefault(prompt, len(places))
    unique = pad_sequence([torch.tensor(prompt) for prompt in places], batch_first=True).to(ids.device)
    cache = DynamicCache(config=backbone.config)
    of_prompts = backbone(input_ids=unique, cache=cache, use_cache=True).last_hidden_state

    owners = []  # of every row, the place of its prompt
    completions = []  # of every row, its token ids
    for row, prompt in enumerate(prompts):
        owners.append(places[prompt])
        completions.append(ids[row, prompt_lengths[row] : lengths[row]])
    owners = torch.tensor(owners, device=ids.device)
    starts = torch.tensor(prompt_lengths, device=ids.device)

    outputs = [None] * len(ids)  # of every row, [T, D]
    shortest_first = sorted(range(len(ids)), key=lambda row: len(completions[row]))
    for rows in torch.tensor(shortest_first, device=ids.device).tensor_split(PARTS):
        part = [completions[row] for row in rows]
        if not part:
            continue
        of_completions = read_completions(backbone, cache, owners[rows], starts[rows], part)
        for row, of_completion in zip(rows.tolist(), of_completions):
            of_prompt = of_prompts[owners[row], : prompt_lengths[row]]
            outputs[row] = torch.cat([of_prompt, of_completion[: len(completions[row])]])
    outputs = pad_sequence(outputs, batch_first=True)
    missing = ids.shape[1] - outputs.shape[1]
    return torch.nn.functional.pad(outputs, (0, 0, 0, missing))


def read_completions(backbone, prompt_cache, owners, starts, completions):
    """The backbone's output for n completions behind their prompts -> [n, t, D], t the length of the longest.

    prompt_cache: keys and values of all prompts, padding on the right. owners [n]: the row in it of every completion's
    prompt; starts [n]: the length of this prompt; completions: n tensors of token ids.
    """
    ids = pad_sequence(completions, batch_first=True)  # [n, t]
    n, t = ids.shape
    if t == 0:
        width = backbone.config.hidden_size
        return torch.zeros(n, 0, width, dtype=backbone.dtype, device=ids.device)
    cache = DynamicCache(config=backbone.config)
    for layer, (keys, values, *_) in enumerate(prompt_cache):
        if keys is not None:  # blocks above the one that is read have none
            cache.update(keys[owners], values[owners], layer)
    columns = torch.arange(prompt_cache.get_seq_length(), device=ids.device)
    sees_prompt = (columns < starts[:, None]).long()  # [n, columns]
    sees_completion = torch.ones_like(ids)  # its padding is on the right, where causal attention does not look
    return backbone(
        input_ids=ids,
        attention_mask=torch.cat([sees_prompt, sees_completion], dim=1),
        position_ids=starts[:, None] + torch.arange(t, device=ids.device),
        cache=cache,
        use_cache=True,
    ).last_hidden_state
