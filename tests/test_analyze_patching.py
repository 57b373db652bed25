"""Activation patching: what a patch must not change, what it must, and which cases are looked for."""

import json
from pathlib import Path

import pytest
import torch
from helpers import KINDS, TOKENIZER, run_script, tiny_model

import analyze_patching
import common
import tasks
from analyze_patching import Case, context_of, effects, right_against_wrong, same_answer
from plumbing.errors import UserError

LEFT = TOKENIZER("12+3=15;\\boxed{")["input_ids"]
RIGHT = TOKENIZER("12+3=16;\\boxed{")["input_ids"]


def case(patched=LEFT, other=RIGHT, wanted="7"):
    return Case("?", patched, other, TOKENIZER(wanted)["input_ids"])


def effects_of(model, other, one, *options):
    """`effects` after every block."""
    args = analyze_patching.parse([*map(str, options)])
    return effects(model, other, one, args, range(len(model.model.layers)))


def logps_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def wanted_logp(logps, context, wanted):
    """Sum of the log-probs of `wanted` behind `context`, from logps [T, V] of both."""
    return sum(float(logps[len(context) - 1 + i, token]) for i, token in enumerate(wanted))


@KINDS
def test_a_patch_of_the_own_stream_changes_nothing_at_all(family, tied):
    model = tiny_model(family, tied)
    found, gap = effects_of(model, model, case(other=LEFT, wanted="15}"), "--micro_batch_tokens", 40)
    assert found.shape == (4, len(LEFT) + 2)
    assert (found == 0).all() and gap == pytest.approx(0, abs=1e-6)


def test_nor_does_it_in_bf16():
    """Where a number has three digits, another order of the same sum is another number."""
    model = tiny_model(num_hidden_layers=3).bfloat16()
    found, _ = effects_of(model, model, case(other=LEFT, wanted="15}"))
    assert (found == 0).all()


@KINDS
def test_a_patch_at_the_end_gives_what_the_other_run_says(family, tied):
    """After the last block, at the last position: nothing of the patched run is left in the first token wanted."""
    model = tiny_model(family, tied)
    one = case()
    found, gap = effects_of(model, model, one)
    ours = wanted_logp(logps_of(model, LEFT + one.wanted), LEFT, one.wanted)
    theirs = wanted_logp(logps_of(model, RIGHT + one.wanted), RIGHT, one.wanted)
    assert gap == pytest.approx(theirs - ours, abs=1e-5) and abs(gap) > 1e-3
    assert found[-1, -1] == pytest.approx(gap, abs=1e-5)


def test_every_patch_is_the_one_that_a_hook_makes_by_hand():
    """One position and block at a time, on transformers' own forward pass: rows mixed up, a block off, no sum."""
    model = tiny_model()
    other = tiny_model(seed=1)
    one = case(wanted="15}")
    ids = one.patched + one.wanted
    found, gap = effects_of(model, other, one, "--temperature", 0.7, "--micro_batch_tokens", 3 * len(ids))
    positions = one.positions()
    assert positions == list(range(LEFT.index(TOKENIZER("5")["input_ids"][0]), len(LEFT)))
    for k in range(4):
        stream = []
        hook = other.model.layers[k].register_forward_hook(lambda m, i, out: stream.append(out))
        logps_of(other, one.other + one.wanted)
        hook.remove()
        source = stream[0][0] if isinstance(stream[0], tuple) else stream[0]
        for i, t in enumerate(positions):

            def patch(module, inputs, output, t=t, source=source):
                states = output[0] if isinstance(output, tuple) else output
                states[0, t] = source[0, t]
                return output

            hook = model.model.layers[k].register_forward_hook(patch)
            with torch.no_grad():
                patched = (model(torch.tensor([ids])).logits[0] / 0.7).log_softmax(-1)
            hook.remove()
            with torch.no_grad():
                plain = (model(torch.tensor([ids])).logits[0] / 0.7).log_softmax(-1)
            expected = wanted_logp(patched, one.patched, one.wanted) - wanted_logp(plain, one.patched, one.wanted)
            assert found[k, i] == pytest.approx(expected, abs=2e-5), (k, t)


def test_with_two_models_every_position_is_patched():
    one = case(patched=LEFT, other=LEFT, wanted="15}")
    assert one.positions() == list(range(len(LEFT) + 2))
    names = [one.group(t) for t in one.positions()]
    assert names == ["same token"] * (len(LEFT) - 1) + ["last"] + ["wanted"] * 2
    model, other = tiny_model(), tiny_model(seed=1)
    found, gap = effects_of(model, other, one)
    assert gap != pytest.approx(0, abs=1e-3) and found.shape == (4, len(LEFT) + 2)


def test_what_is_read_once_for_several_positions_changes_nothing(monkeypatch):
    """Keys and values of the wrong row, of the last patch, or of one token more: another effect."""
    model, other = tiny_model(), tiny_model(seed=1)
    one = case(patched=LEFT, other=LEFT, wanted="15}")
    monkeypatch.setattr(analyze_patching, "SIDE_BY_SIDE", 100)
    expected, gap = effects_of(model, other, one)
    for side_by_side in (1, 4):
        monkeypatch.setattr(analyze_patching, "SIDE_BY_SIDE", side_by_side)
        found, same_gap = effects_of(model, other, one)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        assert same_gap == pytest.approx(gap, abs=1e-5)


def test_only_the_blocks_that_are_asked_for_are_patched():
    model, other = tiny_model(), tiny_model(seed=1)
    args = analyze_patching.parse(["--blocks", "3", "1", "3"])
    blocks = analyze_patching.chosen_blocks(model, args)
    assert blocks == [1, 3]
    found, _ = effects(model, other, case(), args, blocks)
    everything, _ = effects_of(model, other, case())
    assert torch.equal(found, everything[[1, 3]])
    for k in (4, -1):
        args.blocks = [0, k]
        with pytest.raises(UserError, match=f"--blocks {k}: embedded has blocks 0 to 3"):
            analyze_patching.chosen_blocks(model, args)


def test_groups_of_positions():
    one = case()
    assert [one.group(t) for t in one.positions()] == ["other token", "same token", "last"]


def test_summary_takes_the_largest_effect_of_a_group_and_the_mean_over_cases():
    one = case()
    first = torch.tensor([[1.0, 5.0, 2.0], [0.0, 0.0, 4.0]])
    second = torch.tensor([[3.0, -5.0, 2.0], [0.0, 1.0, 6.0]])
    summary = analyze_patching.summarize([one, one], [first, second])
    assert summary["other token"]["mean"] == [2.0, 0.0]
    assert summary["other token"]["standard_error"] == pytest.approx([1.0, 0.0])
    assert summary["same token"]["mean"] == [0.0, 0.5]
    assert summary["last"]["mean"] == [2.0, 5.0] and summary["last"]["cases"] == 2
    assert "wanted" not in summary
    two_tokens = case(other=TOKENIZER("12+3=26;\\boxed{")["input_ids"])
    summary = analyze_patching.summarize([two_tokens], [torch.tensor([[1.0, 5.0, 0.0, 0.0]])])
    assert summary["other token"]["mean"] == [5.0]  # not the mean: tokens that do nothing would dilute it
    assert summary["other token"]["standard_error"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------


def problem():
    found = tasks.Problem("12+3=", "15", "here")
    found.ids = TOKENIZER("12+3=")["input_ids"]
    return found


def test_a_context_ends_with_the_opening_of_the_last_box():
    assert (
        context_of(TOKENIZER, "\\boxed{1};12+3=15;\\boxed{15}") == TOKENIZER("\\boxed{1};12+3=15;\\boxed{")["input_ids"]
    )
    assert context_of(TOKENIZER, "12+3=15") is None


def test_right_and_wrong_have_as_many_tokens_and_differ_before_the_box():
    right = ["12+3=15;\\boxed{15}"]
    wrong = ["\\boxed{14}", "12+3=15;\\boxed{14}", "12+3=9;\\boxed{9}", "12+3=17;\\boxed{17}"]
    found = right_against_wrong(TOKENIZER, problem(), right, wrong)
    assert TOKENIZER.decode(found.patched) == "12+3=12+3=17;\\boxed{"
    assert TOKENIZER.decode(found.other) == "12+3=12+3=15;\\boxed{"
    assert TOKENIZER.decode(found.wanted) == "15}"
    assert right_against_wrong(TOKENIZER, problem(), right, wrong[:3]) is None


def test_two_models_are_asked_for_the_whole_right_answer():
    found = same_answer(TOKENIZER, problem(), ["\\boxed{15}"])
    assert found.patched == found.other == problem().ids
    assert found.wanted == [*TOKENIZER("\\boxed{15}")["input_ids"], TOKENIZER.eos_token_id]
    assert same_answer(TOKENIZER, problem(), []) is None


def test_cases_are_looked_for_in_the_answers_of_the_other_model(monkeypatch):
    """The verdict decides what is right; too few of them is one line."""
    texts = ["12+3=15;\\boxed{15}", "12+3=17;\\boxed{17}"]
    rollouts = common.Rollouts(None, None, None, None, texts=texts, finished=torch.tensor([True, True]))
    monkeypatch.setattr(common, "sample", lambda *args, **kwargs: rollouts)
    args = analyze_patching.parse(["--num_cases", "1", "--num_samples", "2"])
    [found] = analyze_patching.find_cases(None, TOKENIZER, [problem()], args, two_models=False)
    assert TOKENIZER.decode(found.patched).endswith("17;\\boxed{")
    texts.reverse()
    [found] = analyze_patching.find_cases(None, TOKENIZER, [problem()], args, two_models=False)
    assert TOKENIZER.decode(found.patched).endswith("17;\\boxed{")
    texts[:] = ["no box", "none"]
    for two_models in (True, False):
        with pytest.raises(UserError, match="was not found; raise --num_samples"):
            analyze_patching.find_cases(None, TOKENIZER, [problem()], args, two_models)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


OPTIONS = "--num_cases 2 --num_samples 8 --max_completion_length 8 --maps 1".split()


def check_written(groups):
    found = json.loads(Path("runs/patching/patching.json").read_text())
    assert found["cases"] >= 1 and found["blocks"] == [0, 1, 2] and set(found["summary"]) <= groups
    for name in ("patching.png", "map_0.png"):
        assert Path("runs/patching", name).stat().st_size > 10_000


def test_one_command_writes_numbers_and_figures(model_folder, data):
    """As a user runs it, on the right and wrong answers of the throw-away model."""
    done = run_script("analyze_patching.py", model_folder, "--data", data, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "gap" in done.stdout
    check_written({"same token", "other token", "last"})


def test_the_states_of_one_model_go_into_another(model_folder, data, capsys):
    tiny_model(num_hidden_layers=3, embedded=True, seed=3).save_pretrained("random")
    TOKENIZER.save_pretrained("random")
    analyze_patching.main(analyze_patching.parse(["random", str(model_folder), "--data", str(data), *OPTIONS]))
    assert "gap" in capsys.readouterr().out
    check_written({"same token", "last", "wanted"})


def test_models_of_two_shapes_are_one_line(model_folder):
    tiny_model(num_hidden_layers=2, embedded=True).save_pretrained("small")
    TOKENIZER.save_pretrained("small")
    args = analyze_patching.parse([str(model_folder), "small"])
    with pytest.raises(UserError, match="small: its number of blocks is 2, that of .* 3; take models of one shape"):
        analyze_patching.look(args)
