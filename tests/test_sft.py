"""Imitation: what becomes a trajectory, what of it is trained, and priming through the command line."""

import re
import shutil
from pathlib import Path

import pytest
from helpers import TOKENIZER, arguments, read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM

import sft
import tasks
from plumbing.errors import UserError
from plumbing.options import parse
from tasks.behaviours import BEHAVIOURS

QUESTION = [{"role": "user", "content": "What is 1+2?"}]


def test_trajectories_of_every_shape(tmp_path):
    """The answer to imitate must end up in the completion, not in the prompt, where no loss is taken."""
    rows = [
        {"prompt": "1+2?", "response": "3"},
        {"problem": "1+2?", "response": "3"},
        {"question": "1+2?", "response": "3"},
        {"prompt": QUESTION, "response": "3"},
        {"messages": [*QUESTION, {"role": "assistant", "content": "3"}]},
    ]
    trajectories = sft.load_trajectories(str(write_jsonl(tmp_path / "data.jsonl", rows)))
    assert [trajectory.prompt for trajectory in trajectories] == ["1+2?"] * 3 + [QUESTION] * 2
    assert [trajectory.response for trajectory in trajectories] == ["3"] * 5


def test_imitation_trains_the_end_token(tokenizer):
    """Without the end token in the mask the model never learns to stop; with the prompt in it, it learns to ask."""
    trajectories = [
        sft.Trajectory("1+2?", "", ids=[7, 8, 9], response="ab"),
        sft.Trajectory("1?", "", ids=[7], response="abcd"),
    ]
    batch = sft.collate(tokenizer, trajectories, 0, "cpu")
    a, b, c, d, end = tokenizer.convert_tokens_to_ids(["a", "b", "c", "d", tokenizer.eos_token])
    assert batch.ids.tolist() == [[7, 8, 9, a, b, end], [7, a, b, c, d, end]]
    assert batch.mask.tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    assert batch.lengths.tolist() == [3, 5]


def imitate(model_folder, rows, tmp_path, **overrides):
    """One step of imitation of these rows, in the folder 'run'."""
    data = write_jsonl(tmp_path / "trajectories.jsonl", rows)
    settings = dict(max_steps=1, num_prompts=2, max_completion_length=6) | overrides
    sft.main(arguments(sft, model_folder, data, eval_data="", **settings))


ROWS = [{"prompt": f"{i}?", "response": "x" * (4 + i)} for i in range(4)]  # 5, 6, 7 and 8 tokens with the end token


def test_responses_over_the_limit_are_dropped_and_listed(model_folder, tmp_path, capsys):
    """Answers of 6,000 tokens were trained under a limit of 64: lengths that RL then cuts off and scores 0."""
    imitate(model_folder, ROWS, tmp_path)
    said = capsys.readouterr().err
    assert "dropped 2 responses over --max_completion_length 6" in said
    assert "trajectories.jsonl:3 (7 tokens)" in said and "trajectories.jsonl:4 (8 tokens)" in said
    assert read_jsonl("run/metrics.jsonl")[0]["tokens"] == 5 + 6


def test_too_few_responses_within_the_limit(model_folder, tmp_path):
    with pytest.raises(UserError, match="--max_completion_length 5: 3 responses are longer, .*jsonl:2"):
        imitate(model_folder, ROWS, tmp_path, max_completion_length=5)


def test_written_trajectories_over_the_limit_are_refused(model_folder):
    settings = dict(max_steps=1, num_prompts=8, max_completion_length=6, eval_data="", problems=100)
    with pytest.raises(UserError, match="--max_completion_length 6: a written trajectory has"):
        sft.main(arguments(sft, model_folder, "arithmetic", **settings))


def test_a_tokenizer_without_end_token_is_refused(model_folder, tmp_path):
    """Its trajectories would end with None; that the model's generation_config has one does not help."""
    shutil.copytree(model_folder, "no_eos")
    tokenizer = sft.embedded_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained("no_eos")
    with pytest.raises(UserError, match="--model no_eos: its tokenizer has no eos_token"):
        imitate(Path("no_eos"), ROWS, tmp_path)


def test_the_embedded_model_starts_softly(tmp_path):
    """Its internal policies become certain bit by bit only with a head of its own, blocks that write little (0.03, and
    0.03 / sqrt(2 * 8) where they write to the stream) and a final norm of 4. 0.7 M parameters: the pages say so."""
    sft.build_embedded(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert 6.5e5 < model.num_parameters() < 7.5e5
    assert len(model.model.layers) == 8
    assert set(model.model.norm.weight.tolist()) == {4.0}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert parameter.std().item() == pytest.approx(0.0075 if writes else 0.03, rel=0.05), name


@pytest.mark.parametrize("data", ["arithmetic", "countdown-small"])
def test_a_direct_base_learns_single_steps_beside_problems(data):
    """About half and half, so that it can calculate what a chain of steps is made of."""
    trajectories = sft.load_trajectories(data, direct=True)
    exercises = [trajectory for trajectory in trajectories if trajectory.response]
    assert 0.3 < len(exercises) / len(trajectories) < 0.6


def test_a_direct_base_is_never_shown_how_to_work():
    """Steps in six of ten examples, and it works before any priming: there would be nothing to compare with."""
    args = sft.Args(direct=True)
    for i, trajectory in enumerate(sft.load_trajectories("arithmetic", limit=50)):
        text = sft.completion_at(f"visit {i}", trajectory, args)
        assert re.fullmatch(r"\\boxed\{\d+\}", text)


@pytest.mark.parametrize("data, n", [("arithmetic", 20000), ("countdown", 4096)])
def test_built_in_trajectories(data, n):
    """As many problems as --help says, none of them held out; the system prompt goes where the task wants one."""
    trajectories = sft.load_trajectories(data, "Box it.")
    assert len(trajectories) == n
    first = tasks.load_problems(data, "train", 9, "Box it.")
    assert [trajectory.prompt for trajectory in trajectories[:9]] == [problem.prompt for problem in first]
    assert isinstance(trajectories[0].prompt, list) == (data == "arithmetic")


@pytest.mark.parametrize("n", [1, 2, 4, 0])
def test_trajectories_per_problem(n):
    """The same n at every visit, and different ones for different problems; with 0, a new one at every visit."""
    args = sft.Args(behaviours=list(BEHAVIOURS), trajectories_per_problem=n)

    def texts():
        """The completions that 60 steps write, a set for each of two problems."""
        trajectories = sft.load_trajectories("arithmetic", limit=2)
        found = [set(), set()]
        for step in range(60):
            for i, trajectory in enumerate(trajectories):
                found[i].add(sft.completion_at(f"{step}-{i}", trajectory, args))
        return found

    assert texts() == texts()
    for found in texts():
        assert n // 2 < len(found) <= n or (n == 0 and len(found) > 10)  # two of them can be equal by chance


def test_completions_depend_on_seed_and_place_only():
    """A resumed run must imitate what it would have imitated."""
    trajectories = sft.load_trajectories("countdown-small", limit=3)
    for trajectory in trajectories:
        trajectory.ids = TOKENIZER(trajectory.prompt)["input_ids"]
    args = sft.Args(data="countdown-small", behaviours=list(BEHAVIOURS))
    ids = [sft.collate(TOKENIZER, trajectories, seed, "cpu", args).ids.tolist() for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_the_step_size_rises_for_a_tenth_and_falls_to_zero():
    sizes = []
    for step in range(1, 101):
        warmup, decay = sft.schedule(step, 100)
        sizes.append(warmup * decay)
    assert sizes[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert sizes[9] == 1.0 and sizes[10:] == sorted(sizes[10:], reverse=True)
    assert sizes[54] == pytest.approx(0.5) and sizes[-1] == pytest.approx(0.0)
    assert sft.schedule(1, 1) == (1.0, 1.0)


def test_priming_trains(model_folder):
    """Through the command line's own parser, on a folder, and the notation is what it learns from."""
    options = ["--model", str(model_folder), "--behaviours", "verification", "backtracking", "--output_dir", "primed"]
    args = parse(sft.Args, sft.EMBEDDED, [*options, "--max_steps", "4", "--problems", "64", "--filler"])
    assert args.behaviours == ["verification", "backtracking"] and args.filler and args.problems == 64
    sft.main(args)
    losses = [row["loss"] for row in read_jsonl("primed/metrics.jsonl")]
    assert len(losses) == 4 and losses[-1] < losses[0]
    sft.main(arguments(sft, model_folder, "countdown-small", output_dir="countdown", empty=True))
