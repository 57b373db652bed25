"""Look inside: every number against brute force, the lens against the model, cost, memory, and the boundary layer."""

import copy
import errno
import io
import json
import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from helpers import KINDS, TOKENIZER, random_answers, run_script, tiny_model, write_jsonl
from matplotlib.colors import same_color
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

import analyze_entropy
import bupo
import common
import tasks
from analyze_entropy import analyze, boundary_layer, choose_positions, last_positive, stages
from plumbing import figures
from plumbing.clusters import clustered_mean
from plumbing.errors import UserError


def left_padded(rollouts):
    """The same rollouts with the padding in front."""
    ids, attention_mask, mask = (torch.zeros_like(x) for x in (rollouts.ids, rollouts.attention_mask, rollouts.mask))
    for row, real in enumerate(rollouts.attention_mask.bool()):
        for old, new in ((rollouts.ids, ids), (rollouts.attention_mask, attention_mask), (rollouts.mask, mask)):
            new[row, ids.shape[1] - int(real.sum()) :] = old[row, real]
    return common.Rollouts(ids, attention_mask, mask, rollouts.lengths)


def assert_same(result, expected, tolerance):
    """Two results of `analyze`: the same names, and numbers no further apart than the tolerance."""
    rows = list(zip([result, *result["layers"]], [expected, *expected["layers"]], strict=True))
    rows += [(row["standard_error"], other["standard_error"]) for row, other in rows]
    for row, other in rows:
        assert row.keys() - {"heat"} == other.keys() - {"heat"}
        for name in row.keys() - {"heat", "layers", "standard_error"}:
            assert abs(row[name] - other[name]) < tolerance, f"{name}: {row[name]} and {other[name]}"
    for lens, heat in expected.get("heat", {}).items():
        assert result["heat"][lens]["top"] == heat["top"]
        for row, other in zip(result["heat"][lens]["entropy"], heat["entropy"], strict=True):
            assert row == pytest.approx(other, abs=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Every number, against brute force in double precision
# ---------------------------------------------------------------------------------------------------------------------


def watched(model):
    """A copy in double precision, and a dict that will hold what every part of every block gave last."""
    model = copy.deepcopy(model).double()
    kept = {}
    for k, block in enumerate(model.model.layers):
        for part in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):

            def keep(module, inputs, output, key=(k, part)):
                kept[key] = output[0] if isinstance(output, tuple) else output

            getattr(block, part).register_forward_hook(keep)
    return model, kept


def states_of(k, hidden_states, kept):
    """What enters, passes and leaves block k, by the names of entropy.json."""
    pre = hidden_states[k]
    attn = kept[k, "self_attn"]
    mlp = kept[k, "mlp"]
    return dict(
        resid_pre=pre,
        attn_in=kept[k, "input_layernorm"],
        attn_out=attn,
        resid_mid=pre + attn,
        mlp_in=kept[k, "post_attention_layernorm"],
        mlp_out=mlp,
        resid_post=pre + attn + mlp,
    )


def entropy_of(logps):
    return torch.distributions.Categorical(logits=logps).entropy()


@torch.no_grad()
def brute_force(model, prompts, completions, temperature, answer):
    """What `analyze` returns, by the textbook formulas: answer by answer without padding, every activation kept."""
    model, kept = watched(model)
    L = len(model.model.layers)
    lenses = {"": torch.nn.Identity(), "normed_": model.model.norm}
    found = [defaultdict(list) for _ in range(L)]  # name -> values of each answer's tokens
    whole = defaultdict(list)
    heat = {}
    for lens in lenses:
        heat[lens] = dict(entropy=[[] for _ in range(L + 2)], top=[[] for _ in range(L + 2)])
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        outputs = model(torch.tensor([prompt + completion]), output_hidden_states=True)
        produced = slice(len(prompt) - 1, -1)
        target = torch.tensor(completion)
        final = F.log_softmax(outputs.logits[0, produced] / temperature, -1)
        read = torch.tensor([prompt[-1], *completion[:-1]])
        whole["final_entropy"].append(entropy_of(final))
        whole["final_top_is_sampled"].append(final.argmax(-1) == target)
        whole["final_top_is_input"].append(final.argmax(-1) == read)
        for k in range(L):
            states = states_of(k, outputs.hidden_states, kept)
            for added, before in (("attn_out", "resid_pre"), ("mlp_out", "resid_mid")):
                cosine = F.cosine_similarity(states[added], states[before], -1)[0, produced]
                found[k][f"cosine_{added}"].append(cosine)
            for lens, apply in lenses.items():
                logps = {}
                H = {}
                for name, state in states.items():
                    logits = model.get_output_embeddings()(apply(state))[0, produced]
                    logps[name] = F.log_softmax(logits / temperature, -1)
                    H[name] = entropy_of(logps[name])
                    found[k][f"{lens}entropy_{name}"].append(H[name])
                found[k][f"{lens}dH_layer"].append(H["resid_post"] - H["resid_pre"])
                found[k][f"{lens}dH_attn"].append(H["attn_out"] - H["attn_in"])
                found[k][f"{lens}dH_ffn"].append(H["mlp_out"] - H["mlp_in"])
                pi = logps["resid_post"]
                found[k][f"{lens}kl_to_final"].append((pi.exp() * (pi - final)).sum(-1))
                found[k][f"{lens}top_is_sampled"].append(pi.argmax(-1) == target)
                found[k][f"{lens}top_is_input"].append(pi.argmax(-1) == read)
                if i == answer:
                    rows = {k: logps["resid_pre"], k + 1: pi, L + 1: final}  # k: the block below has written the same
                    for depth, row in rows.items():
                        heat[lens]["entropy"][depth] = entropy_of(row).tolist()
                        heat[lens]["top"][depth] = row.argmax(-1).tolist()
    tokens = sum(map(len, completions))
    return dict(
        tokens=tokens,
        positions=tokens,
        **summarised(whole),
        layers=[dict(layer=k, **summarised(found[k])) for k in range(L)],
        heat=heat,
    )


def summarised(found):
    """Name -> values of each answer's tokens, as means over all tokens and, by a loop, their clustered errors."""
    means, errors = {}, {}
    for name, answers in found.items():
        mean = torch.cat(answers).double().mean()
        squares = 0.0
        for values in answers:
            squares += sum(value.double() - mean for value in values) ** 2
        A = len(answers)
        means[name] = mean.item()
        errors[name] = (squares * A / (A - 1)).sqrt().item() / len(torch.cat(answers))
    return dict(**means, standard_error=errors)


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_number_is_that_of_brute_force(family, tied, temperature):
    """A position too early or too late, a norm missing or of another block, a prompt or padding token that counts, a
    temperature forgotten: each moves some number by far more than 1e-4."""
    model, (prompts, completions, rollouts) = tiny_model(family, tied), random_answers()
    result = analyze(model, rollouts, temperature, norm=True, answer=1)
    assert_same(result, brute_force(model, prompts, completions, temperature, answer=1), 1e-4)


@KINDS
def test_last_block_with_final_norm_is_the_model_itself(family, tied):
    """The one equality that catches a lens with another layer's norm (TransformerLens #1076)."""
    model, (prompts, completions, rollouts) = tiny_model(family, tied), random_answers()
    result = analyze(model, rollouts, norm=True)
    own = []
    for prompt, completion in zip(prompts, completions):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].detach()
        own += torch.distributions.Categorical(logits=logits).entropy().tolist()
    last = result["layers"][-1]
    assert last["normed_entropy_resid_post"] == pytest.approx(sum(own) / len(own), abs=1e-5)
    assert result["final_entropy"] == pytest.approx(sum(own) / len(own), abs=1e-5)
    assert last["normed_kl_to_final"] == pytest.approx(0.0, abs=1e-5)
    assert last["kl_to_final"] > 0.01  # without its norm the last block is another policy


def test_padding_batches_and_chunks_change_nothing(monkeypatch):
    """Padding side, tokens per batch and positions per product are about time and memory, never about numbers."""
    model, (_, _, rollouts) = tiny_model(), random_answers()
    expected = analyze(model, rollouts, norm=True)
    assert_same(analyze(model, left_padded(rollouts), norm=True), expected, 1e-5)
    for micro_batch_tokens in (1, 4 * 20, 4 * 30):
        assert_same(analyze(model, rollouts, norm=True, micro_batch_tokens=micro_batch_tokens), expected, 1e-5)
        assert_same(analyze(model, left_padded(rollouts), 1.0, True, micro_batch_tokens), expected, 1e-5)
    for chunk in (1, 7):
        monkeypatch.setitem(analyze_entropy.CHUNK_TOKENS, "cpu", chunk)
        assert_same(analyze(model, rollouts, norm=True), expected, 1e-5)


def test_entropies_survive_large_logits():
    """Raw logits of real models reach hundreds of nats, where a difference of large numbers would lose the entropy."""
    model, (prompts, completions, rollouts) = tiny_model(tied=False), random_answers()
    model.lm_head.weight.data *= 100
    result, expected = analyze(model, rollouts), brute_force(model, prompts, completions, 1.0, 0)
    for here, there in zip(result["layers"], expected["layers"]):
        assert here["entropy_resid_post"] == pytest.approx(there["entropy_resid_post"], abs=1e-4)


@KINDS
def test_the_running_sum_ends_at_the_model_itself(family, tied, monkeypatch):
    """The stream's product is summed up over all blocks: one part left out or taken twice, and it is another policy."""
    model, rollouts = tiny_model(family, tied), random_answers()[2]
    seen = []
    real = analyze_entropy.Measurement.add_block

    def add_block(self, lens, k, positions, at, stream, final_logps):
        real(self, lens, k, positions, at, stream, final_logps)
        if lens.norm is not None and k == 3:
            logps = F.log_softmax(stream * lens.factor(at["resid_post"]), -1)
            seen.append((logps - final_logps).abs().max().item())

    monkeypatch.setattr(analyze_entropy.Measurement, "add_block", add_block)
    analyze(model, rollouts, norm=True)
    assert seen and max(seen) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Errors, and a sample of the positions
# ---------------------------------------------------------------------------------------------------------------------


def test_the_error_of_a_mean_is_that_over_answers():
    """Ten copies of a token say no more than one: the error must be that of three answers, not of thirty tokens."""
    values = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    counts = torch.full((3,), 10.0, dtype=torch.float64)
    mean, error = clustered_mean(values * counts, counts)
    assert mean.item() == 3.0
    assert error.item() == pytest.approx(values.std().item() / 3**0.5)
    unequal = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    mean, error = clustered_mean(torch.tensor([2.0, 3.0, 13.0], dtype=torch.float64), unequal)
    assert mean.item() == 3.0
    assert error.item() == pytest.approx(math.sqrt(3 / 2 * (1 + 9 + 16)) / 6)  # of residuals -1, -3 and 4
    without = torch.tensor([0.0, 10.0, 10.0, 10.0], dtype=torch.float64)  # an answer of which no token was measured
    mean, error = clustered_mean(torch.tensor([0.0, 10.0, 20.0, 60.0], dtype=torch.float64), without)
    assert error.item() == pytest.approx(values.std().item() / 3**0.5)


def test_the_error_is_the_spread_over_fresh_answers():
    """What the number promises: where answers differ, means of fresh samples scatter as far as it says."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(5, 15, (400, 60), generator=generator).double()
    levels = torch.randn(400, 60, generator=generator, dtype=torch.float64)  # of the answers; their tokens add little
    means, errors = zip(*(clustered_mean(level * n, n) for level, n in zip(levels, counts)))
    assert torch.stack(errors).mean() == pytest.approx(torch.stack(means).std().item(), rel=0.1)


def test_a_single_answer_has_no_error(folders):
    result = run_main(folders / "checkpoint-20", "--num_samples", 1, "--max_completion_length", 3)["models"][0]
    assert set(result["layers"][0]["standard_error"].values()) == {None}
    assert set(result["standard_error"].values()) == {None}


def test_a_sample_of_positions_is_drawn_by_the_seed():
    """Of the tokens that were sampled, never of a prompt or of padding; each as likely as any other."""
    mask = random_answers()[2].mask
    for rollouts in (random_answers()[2], left_padded(random_answers()[2])):
        chosen = choose_positions(rollouts.mask, 12, seed=3)
        assert chosen.sum() == 12
        assert not chosen[rollouts.mask == 0].any()
    assert choose_positions(mask, 12, seed=3).equal(choose_positions(mask, 12, seed=3))
    assert not choose_positions(mask, 12, seed=3).equal(choose_positions(mask, 12, seed=4))
    for everything in (0, int(mask.sum()), 10**6):
        assert choose_positions(mask, everything, seed=3).equal(mask.bool())
    often = sum(choose_positions(mask, 7, seed).float() for seed in range(2000))[mask.bool()]
    assert often.min() > 0.7 * often.mean() and often.max() < 1.3 * often.mean()


def test_only_the_sampled_positions_count(monkeypatch):
    """The means are those of the drawn positions alone, although the answer of the heat map is shown from end to end;
    the head is spared all others."""
    model, (_, completions, rollouts) = tiny_model(), random_answers()
    chosen = choose_positions(rollouts.mask, 9, seed=5)
    assert 0 < chosen[1].sum() < len(completions[1])
    projected, head_logits = [], common.head_logits
    monkeypatch.setattr(common, "head_logits", lambda model, h: (projected.append(len(h)), head_logits(model, h))[1])
    result = analyze(model, rollouts, norm=True, answer=1, max_positions=9, seed=5)
    looked_at = 9 + len(completions[1]) - int(chosen[1].sum())
    assert sum(projected) == (8 * 4 + 3) * looked_at
    assert (result["positions"], result["tokens"]) == (9, sum(map(len, completions)))
    everything = analyze(model, rollouts, norm=True, answer=1)
    assert result["heat"]["normed_"]["top"] == everything["heat"]["normed_"]["top"]
    rollouts.mask = chosen.float()
    expected = analyze(model, rollouts, norm=True, answer=1)
    del expected["heat"]
    assert_same(result, expected | dict(tokens=result["tokens"]), 1e-5)


def test_a_sample_is_near_the_whole():
    """The error says how near: a sample of a third, a hundred times."""
    model, rollouts = tiny_model(), random_answers(n=40)[2]
    whole = analyze(model, rollouts)["layers"][2]
    far = []
    for seed in range(25):
        part = analyze(model, rollouts, max_positions=60, seed=seed)["layers"][2]
        far.append((part["dH_ffn"] - whole["dH_ffn"]) / part["standard_error"]["dH_ffn"])
    assert sum(abs(z) < 2 for z in far) >= 20
    assert abs(sum(far)) / len(far) < 0.7


def test_what_was_measured_is_said(folders, capsys):
    """A number over 5 tokens that looks like one over all of them."""
    options = ("--num_samples", 3, "--max_completion_length", 6, "--max_positions", 5)
    result = run_main(folders / "checkpoint-20", *options)["models"][0]
    assert result["positions"] == 5 < result["tokens"]
    assert f"{result['tokens']} tokens, 3 answers, of which 5 tokens at random were measured" in capsys.readouterr().out
    with pytest.raises(UserError, match="--max_positions -1: must be 0 or more"):
        run_main(folders / "checkpoint-20", "--max_positions", -1)


def test_the_bar_counts_to_the_end_and_writes_into_no_log(monkeypatch, capsys):
    """A bar that stops at a half, or runs past its end, says nothing of the time left."""
    model, rollouts = tiny_model(), random_answers()[2]
    bars = []

    class Bar(analyze_entropy.tqdm):
        def __init__(self, *args, disable, **options):
            assert disable is None  # tqdm's word for: not unless stderr is a terminal
            super().__init__(*args, disable=False, file=io.StringIO(), **options)
            bars.append(self)

    for options in (dict(), dict(norm=True, max_positions=9, answer=1)):
        analyze(model, rollouts, **options)
        assert capsys.readouterr().err == ""
        with monkeypatch.context() as patch:
            patch.setattr(analyze_entropy, "tqdm", Bar)
            analyze(model, rollouts, **options)
        assert bars[-1].n == pytest.approx(bars[-1].total)
    assert "left" in bars[-1].fp.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------


def test_one_forward_pass_and_one_projection_of_each_activation(monkeypatch):
    """Per token: what each block reads twice and adds twice, the embedding, and the whole policy. The stream is the sum
    of what was added. A second pass for the KL, or a stream that meets the head again, costs more."""
    model, (_, completions, rollouts) = tiny_model(), random_answers()
    L, passes, projected, head_logits = 4, [], [], common.head_logits
    monkeypatch.setattr(common, "head_logits", lambda model, h: (projected.append(len(h)), head_logits(model, h))[1])
    counter = model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    analyze(model, rollouts, micro_batch_tokens=L * 20)
    counter.remove()
    tokens = sum(map(len, completions))
    assert sum(projected) == (4 * L + 2) * tokens
    assert len(passes) == len(common.micro_batches(rollouts, range(5), 20)) > 1
    projected.clear()
    analyze(model, rollouts, norm=True)
    assert sum(projected) == (8 * L + 3) * tokens  # the embedding normed, too
    assert not any(part._forward_hooks for part in model.modules())  # none is left behind


def test_few_positions_meet_the_head_together():
    """A tenth of the positions, in as many batches: products of a few rows took twice the time a row."""
    model, rollouts = tiny_model(), random_answers(n=40)[2]
    passes = []
    counter = model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    analyze(model, rollouts, micro_batch_tokens=4 * 40)
    all_of_them = len(passes)
    analyze(model, rollouts, micro_batch_tokens=4 * 40, max_positions=20)
    counter.remove()
    assert 2 * (len(passes) - all_of_them) < all_of_them


class Peak(TorchDispatchMode):
    """Largest number of bytes in tensors that were made, and not yet freed, while this mode was on."""

    def __init__(self):
        super().__init__()
        self.live, self.bytes = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self.live[x.untyped_storage()._cdata] = (
                    StorageWeakRef(x.untyped_storage()),
                    x.untyped_storage().nbytes(),
                )
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return result


def peak_bytes(L, answers, micro_batch_tokens):
    model, rollouts = (
        tiny_model(num_hidden_layers=L),
        common.assemble([[7, 8]] * answers, [[9] * 8] * answers, 0, "cpu"),
    )
    with Peak() as peak:
        analyze(model, rollouts, micro_batch_tokens=micro_batch_tokens)
    return peak.bytes


def test_peak_memory_is_flat_in_layers_and_samples():
    """Activations are reduced behind their block, and the streams that have to wait share one budget."""
    base = peak_bytes(L=2, answers=16, micro_batch_tokens=160)
    assert peak_bytes(L=8, answers=16, micro_batch_tokens=160) < 1.1 * base
    assert peak_bytes(L=2, answers=64, micro_batch_tokens=160) < 1.1 * base
    assert peak_bytes(L=2, answers=64, micro_batch_tokens=10**6) > 3 * base  # this measure does see activations,
    assert peak_bytes(L=8, answers=16, micro_batch_tokens=10**6) > 1.5 * base  # and the streams that wait


# ---------------------------------------------------------------------------------------------------------------------
# Which layer to train
# ---------------------------------------------------------------------------------------------------------------------


def test_boundary_layer_is_the_last_that_explores():
    assert boundary_layer([1.5, 0.8, 0.3, 0.0, -0.01, -2.0]) == 2
    assert boundary_layer([0.5, -1.0, 0.2, -1.0]) == 2  # the last one, whatever comes before
    assert boundary_layer([0.1, 0.2, 0.1]) == 2
    assert boundary_layer([4.0, 0.05, -10.0]) == 0  # a two-hundredth of the largest change is none
    assert boundary_layer([0.04, 0.05, -0.1]) == 1  # but the same number counts where all changes are small
    assert boundary_layer(torch.tensor([1.0, -1.0]).tolist()) == 0


def test_the_rule_of_the_paper_asks_for_the_sign_alone():
    """Both are shown: who reads only one cannot tell a boundary from a rounding error."""
    assert last_positive([4.0, 0.05, -10.0]) == 1
    assert last_positive([1.5, 0.0, -2.0]) == 0
    assert last_positive([-1.0, -0.1]) is None


def test_stages_are_named_by_sign_beyond_the_tolerance():
    assert stages([4.0, 0.1, -0.1, -10.0]) == ["exploration", "integration", "integration", "convergence"]
    assert stages([0.0, 0.0]) == ["integration", "integration"]


def result_of(model, ffn):
    """What the figures of changes need of a model, from dH_ffn of its blocks."""
    layers = []
    for k, (change, stage) in enumerate(zip(ffn, stages(ffn))):
        means = dict(dH_ffn=change, dH_attn=-change, entropy_resid_post=10 * change)
        errors = dict(dH_ffn=0.3, dH_attn=0.1, entropy_resid_post=0.2)
        layers.append(dict(layer=k, stage=stage, **means, standard_error=errors))
    return dict(model=model, layers=layers, boundary_layer=boundary_layer(ffn), last_positive=last_positive(ffn))


def test_stages_are_shaded_along_the_blocks():
    """Shaded along the entropies, the figure says at which entropy a model explores, not in which block."""
    axis = analyze_entropy.draw_changes([result_of("a", [2.0, 0.0, -4.0])]).axes[0]
    assert [(shade.get_x(), shade.get_width()) for shade in axis.patches] == [(-0.5, 1), (0.5, 1), (1.5, 1)]
    for shade, stage in zip(axis.patches, ("exploration", "integration", "convergence")):
        assert same_color(shade.get_facecolor(), analyze_entropy.SHADES[stage])


def test_what_training_changed_is_after_minus_before():
    """The other way round, entropy minimization seems to raise the entropy."""
    start = result_of("start", [1.0, 2.0])
    figure = analyze_entropy.draw_training(start, [result_of("trained", [0.5, 2.5])])
    entropy, attn, ffn = (list(axis.lines[0].get_ydata()) for axis in figure.axes)
    assert (entropy, attn, ffn) == ([-5.0, 5.0], [0.5, -0.5], [-0.5, 0.5])


def test_bands_are_one_standard_error_on_either_side():
    """A band that is too wide hides a difference, one that is too narrow invents it."""

    def heights(axis, i):
        return [sorted(set(shape.vertices[:, 1].round(6))) for shape in axis.collections[i].get_paths()]

    start = result_of("start", [1.0])
    changes = analyze_entropy.draw_changes([start]).axes[0]
    assert heights(changes, 0) == [[-1.1, -0.9]]
    assert heights(changes, 1) == [[0.7, 1.3]]
    training = analyze_entropy.draw_training(start, [result_of("trained", [1.0])]).axes[2]
    assert heights(training, 0) == [pytest.approx([-0.3 * 2**0.5, 0.3 * 2**0.5], abs=1e-5)]  # both models have errors


@pytest.mark.parametrize("changes", [[-1.0, -0.5], [0.0, 0.0], [0.001, -1.0]])
def test_without_boundary_layer_the_message_says_why_and_asks_for_one(changes):
    with pytest.raises(UserError, match="--internal_layer 0 to 1") as error:
        boundary_layer(changes)
    message = str(error.value)
    assert f"block {changes.index(max(changes))} with {max(changes):+.3f} nats" in message
    assert "2% of the largest change" in message
    assert "\n" not in message


def test_the_boundary_that_was_found_is_said_with_its_numbers():
    """Half a line that names a block cannot be judged: is it far above zero, and the blocks above it far below?"""
    layers = result_of("a", [2.0, 0.5, -4.0, -0.1])["layers"]
    line = analyze_entropy.found_layer(1, layers, "dH_ffn", 640)
    assert "\n" not in line
    assert "block 1 of 0 to 3" in line
    assert "+0.500 ±0.300 nats; above it at most -0.100 ±0.300, in block 3; no norm, 640 tokens" in line
    assert "sign alone" not in line
    nearly = result_of("a", [2.0, 0.5, -4.0, 0.01])["layers"]
    line = analyze_entropy.found_layer(1, nearly, "dH_ffn", 9)
    assert "by its sign alone it would be block 3, which adds +0.010" in line
    top = analyze_entropy.found_layer(3, layers, "dH_ffn", 640)
    assert "above it" not in top and "whole policy" not in top
    for here in layers:
        here["normed_dH_ffn"] = here["dH_ffn"]
        here["standard_error"]["normed_dH_ffn"] = None  # a single answer
    normed = analyze_entropy.found_layer(3, layers, "normed_dH_ffn", 10)
    assert "(-0.100 nats; final norm applied, 10 tokens); that is the whole policy" in normed


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two random models with tokenizer in one run folder, as two checkpoints of the embedded kind."""
    folder = tmp_path_factory.mktemp("run")
    for step in (20, 100):
        tiny_model(seed=step, embedded=True, num_hidden_layers=3).save_pretrained(folder / f"checkpoint-{step}")
        TOKENIZER.save_pretrained(folder / f"checkpoint-{step}")
    return folder


def run_main(*options):
    analyze_entropy.main(analyze_entropy.parse(list(map(str, options))))
    return json.loads(open("runs/entropy/entropy.json").read())


def test_one_command_writes_numbers_and_figures(folders):
    """As a user runs it, in the order of the shell: checkpoint-100 comes before checkpoint-20."""
    paths = sorted(map(str, folders.iterdir()))
    options = "--num_samples 3 --max_completion_length 5 --norm --output_dir out".split()
    done = run_script("analyze_entropy.py", *paths, *options)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(open("out/entropy.json").read()))["models"]
    assert first["model"].endswith("checkpoint-20")
    assert second["model"].endswith("checkpoint-100")
    names = {"entropy_resid_pre", "entropy_resid_mid", "entropy_resid_post", "entropy_attn_in", "entropy_attn_out"}
    names |= {"entropy_mlp_in", "entropy_mlp_out", "dH_layer", "dH_attn", "dH_ffn", "kl_to_final", "top_is_sampled"}
    names.add("top_is_input")
    names |= {f"normed_{name}" for name in names} | {"cosine_attn_out", "cosine_mlp_out"}
    for k, here in enumerate(second["layers"]):
        assert here.keys() == names | {"layer", "stage", "standard_error"}
        assert here["layer"] == k
        assert here["standard_error"].keys() == names
        assert all(math.isfinite(here[name]) and here["standard_error"][name] >= 0 for name in names)
        errors = here["standard_error"]
        assert f"\n    ±{errors['entropy_resid_post']:12.3f}{errors['dH_layer']:12.3f}" in done.stdout
        assert f"\n{k:5d}{here['entropy_resid_post']:12.3f}{here['dH_layer']:12.3f}" in done.stdout
    assert second["ln_vocab"] == pytest.approx(math.log(len(TOKENIZER)))
    assert len(second["answer"]["lenses"][""]["entropy"]) == 5  # embedding, blocks 0 to 2, whole policy
    assert {len(row) for row in second["answer"]["lenses"][""]["top"]} == {len(second["answer"]["tokens"])}
    import matplotlib.image

    for name in (
        "1_flow",
        "2_change",
        "4_training",
        *(f"3_answer_{p}" for p in (m["model"].strip("/").replace("/", "_") for m in (first, second))),
    ):
        pixels = matplotlib.image.imread(f"out/{name}.png")
        assert min(pixels.shape[:2]) > 300 and pixels.std() > 0.02  # large enough to read, and not blank


def test_given_completions_are_looked_at_with_their_end_token(folders, tmp_path):
    """A row of a run's completions.jsonl; the end token counts unless the answer was cut; one model's text for all."""
    rows = [{"step": 1, "problem": "1+2=", "text": "\\boxed{3}", "answer": None}]
    rows += [{"problem": [{"role": "user", "content": "4+5="}], "text": "4+5", "finished": False}]
    options = ("--completions", write_jsonl(tmp_path / "answers.jsonl", rows))
    result = run_main(folders / "checkpoint-20", *options, "--answer", 1)["models"][0]
    assert result["tokens"] == 4 + 3
    assert result["answer"]["tokens"] == ["4", "+", "5"]
    assert result["answer"]["prompt"].endswith("4+5=")
    result = run_main(folders / "checkpoint-20", *options, "--num_samples", 1)["models"][0]
    assert result["answers"] == 1
    assert result["answer"]["tokens"] == ["\\boxed{", "3", "}", "<|end|>"]


def test_the_problems_looked_at_are_held_out(folders):
    """What training has changed would be that on the problems it has learned by heart."""
    result = run_main(folders / "checkpoint-20", "--num_samples", 1, "--max_completion_length", 3)["models"][0]
    [problem] = tasks.load_problems("arithmetic", "test", 1)
    assert result["answer"]["prompt"].endswith(problem.prompt)


def test_auto_layer_is_the_boundary_layer_of_the_starting_model(folders, monkeypatch, capsys):
    """bupo.py's options are all it needs, and the answer depends on nothing but them; it is part of the training, so
    it looks at no held-out problem."""
    asked = []
    real = tasks.load_problems
    monkeypatch.setattr(
        tasks, "load_problems", lambda data, split, *rest: asked.append(split) or real(data, split, *rest)
    )
    args = bupo.Args(model=str(folders / "checkpoint-20"), system_prompt="", max_completion_length=5)
    seen = []
    monkeypatch.setattr(analyze_entropy, "boundary_layer", lambda changes: seen.append(changes) or 1)
    assert [analyze_entropy.auto_layer(args), analyze_entropy.auto_layer(args)] == [1, 1]
    assert len(seen[0]) == 3
    assert seen[0] == seen[1]
    assert asked == ["train", "train"]
    assert capsys.readouterr().out.count("--internal_layer auto: block 1 of 0 to 2") == 2
    args.internal_norm = True  # then phase one trains what that lens shows
    analyze_entropy.auto_layer(args)
    assert seen[2] != seen[0]
    assert "final norm applied" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What can go wrong
# ---------------------------------------------------------------------------------------------------------------------


def small(config_class, model_class, **settings):
    sizes = dict(vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    return model_class(config_class(**sizes | settings)).eval()


def test_a_model_of_another_build_is_refused_by_name(tmp_path):
    """No list of blocks; blocks without the parts; parts of these names that do not add up to the stream."""
    rollouts = random_answers()[2]
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), n_embd=16, n_layer=2, n_head=2, n_positions=64))
    phi = small(PhiConfig, PhiForCausalLM)
    phi.model.norm = phi.model.final_layernorm
    gemma = small(Gemma2Config, Gemma2ForCausalLM)
    for model, name in ((gpt2, "GPT2LMHeadModel"), (phi, "PhiForCausalLM"), (gemma, "Gemma2ForCausalLM")):
        with pytest.raises(UserError, match=name):
            analyze(model, rollouts)
    model = tiny_model()
    model.model.norm = torch.nn.LayerNorm(32)
    model.model.norm.variance_epsilon = 1e-6
    with pytest.raises(UserError, match="Qwen3ForCausalLM: its final norm is no RMS norm"):
        analyze(model, rollouts, norm=True)
    gpt2.save_pretrained(tmp_path / "gpt2")
    TOKENIZER.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        run_main(tmp_path / "gpt2", "--data", "arithmetic")


def test_what_is_shown_is_in_the_folder(folders, monkeypatch, capsys):
    """A full disk left a table on the screen that no file held."""

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figures, "save_figures", fail)
    with pytest.raises(OSError):
        run_main(folders / "checkpoint-20", "--data", "arithmetic", "--num_samples", 2)
    assert "whole" not in capsys.readouterr().out
