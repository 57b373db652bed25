"""Rollouts: what is sampled must be what is trained, token for token, whatever the model's settings say."""

import gc
import json

import pytest
import torch
from helpers import tiny_model

import common
from plumbing.models import load_model

# Token ids straight, of different lengths; the second holds the end token 1 inside, as a chat prompt holds turn marks.
PROMPTS = [[7, 30, 50], [9, 1, 60, 12, 80, 33, 21, 1, 14], [40], [11, 12, 13, 14, 15, 16]]
LONGEST = 9
ENDS = [1, 30, 50, 66, 77, 88, 90]  # seven of 101 tokens end an answer: a random model needs them often enough


def several_ends(model, tokenizer):
    """Six end tokens in generation_config, the seventh in the tokenizer."""
    model.generation_config.eos_token_id = ENDS[1:]
    assert tokenizer.eos_token_id == ENDS[0]


def alone(model, rollouts, row, temperature):
    """Log-probs and entropies of one row's completion from the model's own logits: no padding, no cache."""
    G = len(rollouts.ids) // len(PROMPTS)
    n = len(PROMPTS[row // G])
    ids = rollouts.ids[row, : n + int(rollouts.lengths[row])]
    with torch.no_grad():
        logits = model(ids[None]).logits[0, n - 1 : -1] / temperature
    distribution = torch.distributions.Categorical(logits=logits)
    return distribution.log_prob(ids[n:]), distribution.entropy()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("pad_is_eos", [False, True], ids=["", "pad_is_eos"])
def test_sampling_and_training_see_the_same_distribution(family, temperature, checkpointing, pad_is_eos, tokenizer):
    """Temperature lost, cache dropped by checkpointing, padding by token id, dropout on: wrong from step 1."""
    model = tiny_model(family, attention_dropout=0.5)
    several_ends(model, tokenizer)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    rollouts = common.sample(model, tokenizer, PROMPTS, 4, 12, temperature, seed=3)
    assert model.training  # as it was
    assert len(set(rollouts.lengths.tolist())) > 3
    model.eval()
    with torch.no_grad():
        logps, entropy = common.completion_logps(model, rollouts, range(16), temperature)
    assert (logps - rollouts.logps).abs().max() < 1e-5
    assert (entropy - rollouts.entropy).abs().max() < 1e-5
    for row in range(16):
        expected_logps, expected_entropy = alone(model, rollouts, row, temperature)
        completion = rollouts.mask[row].bool()
        assert torch.allclose(rollouts.logps[row][completion], expected_logps, atol=1e-5)
        assert torch.allclose(rollouts.entropy[row][completion], expected_entropy, atol=1e-5)


def test_mask_ends_with_the_first_end_token(tokenizer):
    """No end token in the mask: the model never learns to stop. More: padding is trained. One of several: babble."""
    model = tiny_model()
    several_ends(model, tokenizer)
    tokenizer.pad_token = tokenizer.eos_token  # masks by `ids != pad` would lose it, and the prompt's turn marks
    rollouts = common.sample(model, tokenizer, PROMPTS, 16, 24, seed=0)
    last_tokens = set()
    for row, ids in enumerate(rollouts.ids.tolist()):
        prompt, length = PROMPTS[row // 16], int(rollouts.lengths[row])
        start, end = len(prompt), len(prompt) + length
        completion = ids[start:end]
        assert ids[:start] == prompt  # prompt-major
        assert rollouts.mask[row].tolist() == [float(start <= t < end) for t in range(len(ids))]
        assert rollouts.attention_mask[row].tolist() == [int(t < end) for t in range(len(ids))]
        assert not set(completion[:-1]) & set(ENDS)
        assert bool(rollouts.finished[row]) == (completion[-1] in ENDS)
        assert length == 24 or rollouts.finished[row]
        assert rollouts.texts[row] == tokenizer.decode(completion, skip_special_tokens=True)
        last_tokens |= {completion[-1]} & set(ENDS)
    assert last_tokens == set(ENDS) and not rollouts.finished.all()
    outside = rollouts.mask == 0
    assert not rollouts.logps[outside].any()
    assert not rollouts.entropy[outside].any()


def test_end_at_the_length_limit_is_finished(tokenizer):
    """An answer whose last allowed token is the end token is whole; counted as cut, it would score 0."""
    model = tiny_model()
    rollouts = common.sample(model, tokenizer, [[7]], 2000, 1, seed=0)
    assert rollouts.lengths.tolist() == [1] * 2000
    assert rollouts.finished.tolist() == [row[1] == 1 for row in rollouts.ids.tolist()]
    assert 0 < rollouts.finished.sum() < 2000


# Settings of a model's files that bend its samples. The first kind save_pretrained accepts, so it stays with the model.
BENDING = dict(do_sample=True, top_k=2, top_p=0.5, min_p=0.3, temperature=0.1, repetition_penalty=1.9, max_length=3)


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_generation_config_changes_no_sample(do_sample, temperature, tokenizer, tmp_path):
    """top_k and penalties leak from a model's files into sampling: another distribution than the one trained."""
    clean = tiny_model()
    clean.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    poison = BENDING | dict(do_sample=do_sample, eos_token_id=ENDS[1:], no_repeat_ngram_size=1)
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(poison))
    model, tokenizer = load_model(str(tmp_path / "model"), "cpu", "float32")
    if do_sample:  # else the file contradicts itself, and is thrown away
        assert all(getattr(model.generation_config, name) == value for name, value in poison.items())
    several_ends(clean, tokenizer)
    ours = common.sample(model, tokenizer, PROMPTS, 32, 8, temperature, seed=1)
    plain = common.sample(clean, tokenizer, PROMPTS, 32, 8, temperature, seed=1)
    assert torch.equal(ours.ids, plain.ids) and torch.equal(ours.logps, plain.logps)
    starts = {row[3] for row in ours.ids[:32].tolist()}
    assert len(starts) > 5  # top_k would leave two
    assert ours.lengths.max() > 3
    logps, _ = common.completion_logps(model, ours, range(len(ours.ids)), temperature)
    assert (logps - ours.logps).abs().max() < 1e-5


def test_greedy_is_generate(tokenizer):
    """The decode loop against an independent one: a cache, mask or position off by one gives other tokens."""
    model = tiny_model()
    several_ends(model, tokenizer)
    rollouts = common.sample(model, tokenizer, PROMPTS, 1, 40, temperature=0)
    ids = torch.zeros(4, LONGEST, dtype=torch.long)
    attention_mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, -len(prompt) :] = 1
    generated = model.generate(
        ids,
        attention_mask=attention_mask,
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=ENDS,
        pad_token_id=0,
    )[:, LONGEST:]
    for row, prompt in enumerate(PROMPTS):
        ours = rollouts.ids[row][rollouts.mask[row].bool()].tolist()
        assert ours == generated[row, : len(ours)].tolist()
        assert len(ours) == 40 or ours[-1] in ENDS
    assert len(set(rollouts.lengths.tolist())) > 1


def test_waves_change_no_greedy_answer(tokenizer):
    """Samples are drawn in waves that fit the memory; a wave must not lose rows, mix them up or see its neighbours."""
    model = tiny_model()
    several_ends(model, tokenizer)
    whole = common.sample(model, tokenizer, PROMPTS, 3, 20, 0)
    for budget in (1, 2 * (LONGEST + 20), 5 * (LONGEST + 20)):  # one, two and five rows at a time
        waves = common.sample(model, tokenizer, PROMPTS, 3, 20, 0, max_rollout_tokens=budget)
        assert torch.equal(waves.ids, whole.ids) and torch.equal(waves.mask, whole.mask)
        assert waves.texts == whole.texts
        assert torch.allclose(waves.logps, whole.logps, atol=1e-5)


def test_waves_change_no_sample(tokenizer):
    """Every token's noise is its own: what else is in its wave must not move it. On CPU the last bits agree, too."""
    model = tiny_model()
    several_ends(model, tokenizer)
    whole = common.sample(model, tokenizer, PROMPTS, 3, 20, seed=4)
    assert len({tuple(row) for row in whole.ids.tolist()}) == 12  # rows of one prompt differ
    for budget in (1, 2 * (LONGEST + 20), 5 * (LONGEST + 20)):
        waves = common.sample(model, tokenizer, PROMPTS, 3, 20, max_rollout_tokens=budget, seed=4)
        assert torch.equal(waves.ids, whole.ids)


def test_the_noise_picks_the_token_by_its_share(monkeypatch):
    """Token i has the interval [p_0 + ... + p_(i-1), p_0 + ... + p_i): nothing before, after or between it."""
    probs = torch.tensor([0.0, 0.25, 0.5, 0.0, 0.125, 0.125, 0.0])
    noise = [0.0, 0.2499, 0.25, 0.7499, 0.75, 0.8749, 0.875, 1 - 2**-53]
    tokens, logps = tokens_of_noise(monkeypatch, probs, noise)
    assert tokens.tolist() == [1, 1, 2, 2, 4, 4, 5, 5]
    assert torch.allclose(logps.exp(), probs[tokens])


def test_rare_tokens_are_sampled_as_often_as_they_should_be(monkeypatch):
    """Added up in fp32, 50,000 tokens of 1e-9 each behind a sure one would vanish or come too often."""
    probs = torch.full([50_001], 1e-9)
    probs[0] = 1 - 5e-5
    tokens, _ = tokens_of_noise(monkeypatch, probs, [1 - 5.05e-5, 1 - 4.95e-5, 1 - 2.5e-5, 1 - 1e-8])
    assert tokens.tolist() == pytest.approx([0, 500, 25_000, 49_990], abs=200)


def tokens_of_noise(monkeypatch, probs, noise):
    """What the sampler makes of a list of noise, if the policy is probs [V] everywhere -> (tokens, logps)."""
    logits = probs.log().clamp(min=-200).expand(len(noise), -1)
    monkeypatch.setattr(common, "head_logits", lambda model, hidden: logits)
    noise = torch.tensor(noise, dtype=torch.float64)
    tokens, logps, _ = common.sample_tokens(None, None, 1.0, noise)
    return tokens, logps


def test_waves_keep_to_their_budget(tokenizer, monkeypatch):
    """max_rollout_tokens bounds the cache; a wave over budget ends in an out-of-memory error on a real model."""
    model = tiny_model()
    several_ends(model, tokenizer)
    passes = watch_passes(model, monkeypatch)
    common.sample(model, tokenizer, PROMPTS, 8, 20, max_rollout_tokens=5 * (LONGEST + 20), seed=0)
    assert max(rows for rows, _, _ in passes) == 5
    assert max(rows * columns for rows, _, columns in passes) <= 5 * (LONGEST + 20)


@torch.no_grad()
def test_a_wave_of_unequal_contexts_keeps_to_its_budget(monkeypatch):
    """Beside a row that goes on after a pause a new one starts far to the right: the cache could outgrow its budget."""
    model = tiny_model()
    passes = watch_passes(model, monkeypatch)
    contexts = [[5] * 20, [6], [7]]
    wave = dict(few=0, room=3 * 25, temperature=1.0, stop=[], noise=torch.rand(3, 25, dtype=torch.float64))
    steps = list(common.sample_wave(model, contexts, [25] * 3, [0, 1, 2], **wave))
    assert [len(rows) for rows, *_ in steps[:6]] == [3] * 5 + [2]
    assert len(steps) < 24 and 70 < max(rows * columns for rows, _, columns in passes) <= 75


def test_no_distribution_outlives_its_step(tokenizer, monkeypatch):
    """Log-probs and probabilities of 512 rows and 152,000 words are 0.6 GiB: too much to hold beside the next pass."""
    model = tiny_model()
    real = common.run_blocks
    alive = []

    def run_blocks(*args):
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        alive.append(sum(tensor.shape[-1:] == (model.config.vocab_size,) for tensor in tensors))
        return real(*args)

    monkeypatch.setattr(common, "run_blocks", run_blocks)
    common.sample(model, tokenizer, PROMPTS, 2, 5, seed=0)
    assert len(alive) > 3 and max(alive) <= alive[0]


def watch_passes(model, monkeypatch):
    """A list that grows with every pass of the sampler: (rows, new tokens of each, columns held for the cache)."""
    passes = []
    forward = type(model.model).forward

    def watched(self, **kw):
        output = forward(self, **kw)
        cache = kw.get("cache")
        if cache is not None:
            keys = cache.layers[0].keys
            passes.append((*kw["input_ids"].shape, keys.stride(1) // keys.shape[3]))
        return output

    monkeypatch.setattr(type(model.model), "forward", watched)
    return passes


def test_no_long_tail_runs_alone(tokenizer, monkeypatch):
    """A wave that waits for its longest answer decodes one row at the price of eight, most of the time."""
    model = tiny_model()
    several_ends(model, tokenizer)  # seven tokens of 101 end an answer: 14 tokens in the mean
    passes = watch_passes(model, monkeypatch)
    prompts = [[31 + i] for i in range(64)]
    rollouts = common.sample(model, tokenizer, prompts, 1, 200, max_rollout_tokens=8 * 201, seed=0)
    decoded = [rows for rows, new, _ in passes if new == 1]
    full = max(i for i, rows in enumerate(decoded) if rows == 8)  # afterwards nothing waits
    assert min(decoded[: full + 1]) >= 4
    longest_of_waves = rollouts.lengths.view(8, 8).amax(1)
    assert len(decoded) < 0.6 * int(longest_of_waves.sum())
    with torch.no_grad():
        logps, _ = common.completion_logps(model, rollouts, range(64), 1.0)
    assert (logps - rollouts.logps).abs().max() < 1e-5


def test_long_prefills_go_in_pieces(tokenizer, monkeypatch):
    """Paused answers are prefilled again, whole: in one pass that could take more memory than all the training."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 150, (300,), generator=generator).tolist()
    passes = watch_passes(model, monkeypatch)
    prompts = [torch.randint(3, 101, (length,), generator=generator).tolist() for length in lengths]
    rollouts = common.sample(model, tokenizer, prompts, 1, 2, seed=0)
    assert sum(new for _, new, _ in passes) == 150
    assert max(rows * new for rows, new, _ in passes) <= 2**15
    with torch.no_grad():
        logps, _ = common.completion_logps(model, rollouts, range(300), 1.0)
    assert (logps - rollouts.logps).abs().max() < 1e-5


def test_seed_decides_the_samples(tokenizer):
    """A seed that is not wired in makes no run repeatable; one that is reset per wave draws the same answers again."""
    model = tiny_model()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = common.sample(model, tokenizer, PROMPTS, 4, 12, seed=5)
    torch.manual_seed(99)  # the global generator has no say ...
    again = common.sample(model, tokenizer, PROMPTS, 4, 12, seed=5)
    other = common.sample(model, tokenizer, PROMPTS, 4, 12, seed=6)
    assert torch.equal(first.ids, again.ids) and torch.equal(first.logps, again.logps)
    assert first.texts != other.texts
    torch.manual_seed(0)  # ... and is left as it was
    common.sample(model, tokenizer, PROMPTS, 4, 12, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    waves = common.sample(model, tokenizer, PROMPTS[:1], 12, 12, max_rollout_tokens=1, seed=5)
    assert len(set(waves.texts)) > 6


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_samples_follow_the_softmax(temperature, tokenizer):
    """Chi-square of 20,000 two-token samples over all their outcomes: any warping of the distribution shows.

    The seed is fixed. Were it free, a sound sampler would fail one time in a million.
    """
    model = tiny_model(vocab_size=6, seed=2)
    prompt, n = [3, 2, 5], 20_000
    rollouts = common.sample(model, tokenizer, [prompt], n, 2, temperature, seed=0)

    def softmax(ids):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
            return torch.softmax(logits / temperature, -1)

    expected = {}
    for a, p in enumerate(softmax(prompt)):
        if a == tokenizer.eos_token_id:
            expected[a,] = n * float(p)
        else:
            for b, q in enumerate(softmax([*prompt, a])):
                expected[a, b] = n * float(p * q)
    found = dict.fromkeys(expected, 0)
    for row, length in zip(rollouts.ids.tolist(), rollouts.lengths.tolist()):
        found[tuple(row[3 : 3 + length])] += 1
    common_cells = [cell for cell in expected if expected[cell] >= 5]  # chi-square wants 5 expected per cell
    pairs = [(found[cell], expected[cell]) for cell in common_cells]
    rest = [cell for cell in expected if expected[cell] < 5]  # the others are one cell together
    if rest:
        found_rest = sum(found[cell] for cell in rest)
        pairs.append((found_rest, sum(expected[cell] for cell in rest)))
    statistic = torch.tensor(sum((f - e) ** 2 / e for f, e in pairs))
    freedom = torch.tensor(float(len(pairs) - 1))
    assert freedom > 9
    assert torch.special.gammaincc(freedom / 2, statistic / 2) > 1e-6


def test_temperature_zero_has_finite_log_probs(tokenizer):
    """Greedy answers are scored at temperature 1: a division by 0 would put nan into every figure of the evaluation."""
    rollouts = common.sample(tiny_model(), tokenizer, PROMPTS, 1, 8, temperature=0)
    assert torch.isfinite(rollouts.logps).all() and torch.isfinite(rollouts.entropy).all()
    logps, _ = common.completion_logps(tiny_model(), rollouts, range(4), 1.0)
    assert torch.allclose(logps, rollouts.logps, atol=1e-5)
