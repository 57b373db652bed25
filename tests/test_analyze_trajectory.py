"""Along the trajectory: the probe against one forward pass per position, what must not leak, weights that come back,
behaviours against hand labels, and the commands."""

import errno
import json
import time
from pathlib import Path

import pytest
import torch
from helpers import TOKENIZER, tiny_model, write_jsonl
from matplotlib.axes import Axes

import analyze_trajectory as trajectory
import common
import tasks
from analyze_trajectory import answer_nll
from plumbing import figures, verifier
from plumbing.errors import UserError
from plumbing.models import encode, load_model

FAMILIES = pytest.mark.parametrize("family, tied", [("qwen3", True), ("qwen2", True), ("llama", False)])


def random_ids(n, seed=0):
    return torch.randint(6, len(TOKENIZER), (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# Prompt, thinking, and a branch of two cue tokens, three answer tokens and a closing one that does not count.
PROMPT, THINKING, BRANCH, MASK = random_ids(5, 1), random_ids(11, 2), random_ids(6, 3), [0, 0, 1, 1, 1, 0]


@torch.no_grad()
def one_pass_per_position(model, prompt, thinking, branch, mask, norm=False):
    """The loss under every block and the whole policy by the plain formula, in double precision -> [L + 1, T + 1]."""
    model, columns, last = model.double(), [], {}
    handle = model.model.layers[-1].register_forward_hook(lambda module, inputs, output: last.update(raw=output))
    for i in range(len(thinking) + 1):
        output = model(torch.tensor([prompt + thinking[:i] + branch]), output_hidden_states=True)
        streams = [*output.hidden_states[1:-1], last["raw"]]  # the last of hidden_states is normed already
        logits = [model.lm_head(model.model.norm(stream) if norm else stream) for stream in streams] + [output.logits]
        start = len(prompt) + i
        answer = [start + j for j, counts in enumerate(mask) if counts]
        columns.append(
            [-sum(z.log_softmax(-1)[0, t - 1, branch[t - start]] for t in answer) / len(answer) for z in logits]
        )
    handle.remove()
    model.float()
    return torch.tensor(columns).T


# ---------------------------------------------------------------------------------------------------------------------
# The probe
# ---------------------------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("norm", [False, True])
def test_the_probe_is_one_forward_pass_per_position(family, tied, norm):
    """A position id off by one, a branch that sees a token too many or too few, a layer read before or after its block,
    an answer mask shifted by one: each moves some number by far more than 1e-4."""
    model = tiny_model(family, tied)
    expected = one_pass_per_position(model, PROMPT, THINKING, BRANCH, MASK, norm)
    found = answer_nll(model, PROMPT, THINKING, BRANCH, MASK, layers=True, norm=norm)
    assert found.shape == (5, len(THINKING) + 1)
    assert (found - expected).abs().max() < 1e-4
    assert (answer_nll(model, PROMPT, THINKING, BRANCH, MASK) - expected[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("chunk_tokens", [1, 7, 20, 10**6])
def test_chunks_of_branches_change_nothing(chunk_tokens):
    """How many branches share a pass is about memory only. What one left in the cache would show in the next."""
    model = tiny_model()
    expected = answer_nll(model, PROMPT, THINKING, BRANCH, MASK, layers=True)
    found = answer_nll(model, PROMPT, THINKING, BRANCH, MASK, True, False, chunk_tokens)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "thinking, branch, mask",
    [([], BRANCH, MASK), (THINKING, BRANCH[:1], [1]), (THINKING, BRANCH, [1] * 6), (THINKING[:1], BRANCH[:2], [1, 0])],
)
def test_the_probe_at_its_edges(thinking, branch, mask):
    """No thinking; no cue, so that the thinking's own last token predicts the answer's first; one answer token."""
    model = tiny_model()
    expected = one_pass_per_position(model, PROMPT, thinking, branch, mask)
    assert (answer_nll(model, PROMPT, thinking, branch, mask, layers=True) - expected).abs().max() < 1e-4


def test_a_prefix_knows_nothing_of_what_follows():
    """Otherwise the answer would be 'known' before it was thought of."""
    model, j = tiny_model(), 6
    changed = [*THINKING[:j], TOKENIZER.vocab_size - 1, *THINKING[j + 1 :]]
    before, after = (answer_nll(model, PROMPT, ids, BRANCH, MASK) for ids in (THINKING, changed))
    assert (before[: j + 1] - after[: j + 1]).abs().max() < 1e-5  # prefixes 0..j do not hold token j
    assert (before[j + 1 :] - after[j + 1 :]).abs().min() > 1e-4


def test_the_model_is_left_as_it_was(monkeypatch):
    model = tiny_model()
    norm = model.model.norm
    answer_nll(model, PROMPT, THINKING, BRANCH, MASK)
    assert model.model.norm is norm
    monkeypatch.setattr(common, "token_logps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer_nll(model, PROMPT, THINKING, BRANCH, MASK)
    assert model.model.norm is norm


def test_the_thinking_runs_through_the_model_once():
    """P + T tokens for the trunk, S - 1 for each of the T + 1 branches, and none twice."""
    model, tokens = tiny_model(), []
    handle = model.model.layers[0].register_forward_hook(
        lambda module, inputs, output: tokens.append(inputs[0].shape[1])
    )
    answer_nll(model, PROMPT, THINKING, BRANCH, MASK)
    handle.remove()
    assert sum(tokens) == len(PROMPT + THINKING) + (len(THINKING) + 1) * (len(BRANCH) - 1)


def test_ten_times_faster_than_one_pass_per_position():
    """200 tokens of thinking. Measured: about 30 times (benchmarks/descent.py for larger models and longer cues)."""
    model, thinking = tiny_model(), random_ids(200)

    @torch.no_grad()
    def plain():
        for i in range(201):
            ids = torch.tensor([PROMPT + thinking[:i] + BRANCH])
            hidden = common.hidden_states(model, ids[:, :-1], torch.ones_like(ids[:, :-1]))
            common.token_logps(model, hidden[:, -3:], ids[:, -3:])

    def seconds(function):
        start = time.process_time()
        function()
        return time.process_time() - start

    def once():
        answer_nll(model, PROMPT, thinking, BRANCH, MASK)

    assert seconds(plain) > 10 * min(seconds(once) for _ in range(3))


def test_a_sliding_window_is_refused():
    """Its cache has forgotten the tokens that a branch at the beginning needs."""
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(UserError, match="sliding"):
        answer_nll(model, PROMPT, THINKING, BRANCH, MASK)


def test_unrelated_prefixes_in_one_batch():
    """Padding must not shift positions, and the cue must not count."""
    model = tiny_model()
    expected = one_pass_per_position(model, PROMPT, THINKING, BRANCH, MASK)[-1]
    prefixes = [PROMPT + THINKING, PROMPT, PROMPT + THINKING[:4]]
    for budget in (1, 10**6):
        found = trajectory.direct_nll(model, prefixes, [BRANCH] * 3, [MASK] * 3, budget)
        assert (found - expected[[-1, 0, 4]]).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Cue, thinking, token classes
# ---------------------------------------------------------------------------------------------------------------------


def test_the_closing_brace_counts_and_the_cue_does_not():
    ids, mask = trajectory.spell_cue(TOKENIZER, ";\\boxed{ANSWER}", "27")
    assert [TOKENIZER.decode([i]) for i in ids] == [";", "\\boxed{", "2", "7", "}"]
    assert mask == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1+2=3;\\boxed{3}", "1+2=3;"),
        ("\\boxed{4}, no: \\boxed{3}", "\\boxed{4}, no: "),  # only the last one is the answer
        ("\\boxed{3}", ""),
        ("1+2=3;", "1+2=3;"),
        ("a</think>so \\boxed{3}", "a"),
        ("2+1<answer>2+1</answer>", "2+1"),
    ],
)
def test_thinking_ends_before_the_answer(text, expected):
    """One token of the answer in the prefix, and the loss at 100% says nothing any more."""
    ids = TOKENIZER(text)["input_ids"]
    found = trajectory.make_trajectory(TOKENIZER, tasks.Problem("1+2=", "3"), ids, True)
    assert "".join(found.pieces) == expected
    assert found.ids == ids[: len(found.pieces)]


def test_blanks_around_a_gold_answer_are_no_part_of_it(tmp_path):
    """A probe for ' 10 ' asks for another text than the model writes: its loss would stay high to the end."""
    row = dict(problem="1+2+3+4=", text="1+2=3;\\boxed{10}", gold=" 10 ", reward=1.0)
    path = write_jsonl(tmp_path / "blanks.jsonl", [row])
    args = trajectory.parse(["descent", "embedded", "--completions", str(path)])
    [found] = trajectory.read_trajectories(TOKENIZER, args)
    assert found.problem.answer == "10"


def test_token_classes_of_english_and_of_the_notation():
    pieces = ["So", " x", " =", " ", "4", ".", " Wait", ",", " hold", " on", ": ", "3", ".", "5", "\n"]
    names = ["inference", "other", "operator", "result", "result", "delimiter", "reflection", "delimiter"]
    names += ["reflection", "reflection", "delimiter", "number", "other", "number", "delimiter"]
    assert trajectory.token_classes(pieces) == names
    found = dict(zip("abcdefghijklm", trajectory.token_classes(list("7+5=12?12-5=7~<9"))))
    assert list(found.values()) == (
        ["number", "operator", "number", "operator", "result", "result", "reflection"]
        + ["number", "number", "operator", "number", "operator", "result"]
    )
    assert trajectory.token_classes(list("~<9-4")) == ["reflection", "inference", "number", "operator", "number"]
    assert trajectory.token_classes(["", "a"]) == ["other", "other"]


def test_losses_between_steps_by_hand():
    """Inside a step the loss says how a question out of place is answered: only the ends of kept steps count."""
    rows = [
        dict(right=True, tokens=list("1;2~3;"), nll=[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]),
        dict(right=True, tokens=list("1;"), nll=[1.0, 8.0, 5.0]),
        dict(right=False, tokens=list("12"), nll=[2.0, 3.0, 4.0]),
    ]
    assert trajectory.losses_between_steps(rows[0]) == [9.0, 7.0, 3.0]
    steps = trajectory.summarize_steps(rows)
    assert list(steps) == ["right"]  # the wrong one has no steps
    assert [point["trajectories"] for point in steps["right"]] == [2, 2, 1]
    assert [point["quartiles"][1] for point in steps["right"]] == [5.0, 6.0, 3.0]
    lines = trajectory.descent_table({}, steps, {}, None).splitlines()
    assert [line.split() for line in lines if "after" in line] == [
        ["right,", "after", "0", "steps", "5.000", "2"],
        ["right,", "after", "1", "steps", "6.000", "2"],
        ["right,", "after", "2", "steps", "3.000", "1"],
    ]
    assert trajectory.summarize_steps(rows[2:]) == {}


def test_relative_changes_leave_out_what_is_settled():
    """A loss of 1e-9 that becomes 1e-6 is no change by a factor of 1000: that is how means of ratios explode."""
    found = trajectory.relative_changes([(list("1+;"), [2.0, 1.0, 1e-9, 1e-6]), (list("2"), [1.0, 3.0])])
    assert found == {"number": [-0.5, 2.0], "operator": [pytest.approx(-1.0)]}
    assert trajectory.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == [2.0, 3.0, 4.0]


def test_curves_of_all_lengths_start_and_end_together():
    for T in (1, 2, 40, 41, 300):
        points = trajectory.on_grid(torch.arange(T + 1.0))
        assert len(points) == trajectory.GRID
        assert points[0] == 0
        assert points[-1] == T
        assert abs(points[trajectory.GRID // 2] - T / 2) <= 0.5


def test_first_to_know_is_a_block_that_no_later_one_contradicts():
    columns = [[3.0, 0.5, 0.1], [0.1, 0.2, 0.3], [0.1, 2.0, 0.1], [0.7, 0.7, 0.1], [0.5, 0.5, 3.0]]
    assert trajectory.first_to_know(torch.tensor(columns).T) == [1, 0, None, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Landscape
# ---------------------------------------------------------------------------------------------------------------------


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_come_back_bit_for_bit(tied, dtype):
    """Adding a direction and taking it off again does not do it: rounding stays, in bf16 a lot of it."""
    model = tiny_model(tied=tied).to(dtype)
    before, seen = weights(model), []
    trajectory.on_plane(model, [-1.0, 0.3], lambda: seen.append(weights(model)))
    assert all(torch.equal(before[name], after) for name, after in weights(model).items())
    for name, weight in before.items():
        moved = any(not torch.equal(weight, there[name]) for there in seen)
        assert moved != ("embed_tokens" in name or "lm_head" in name)

    def fail():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        trajectory.on_plane(model, [1.0], fail)
    assert all(torch.equal(before[name], after) for name, after in weights(model).items())


def test_directions_have_the_norm_of_what_they_move_and_depend_on_the_seed():
    model = tiny_model()
    before = weights(model)

    def moves(seed):
        [[a]] = trajectory.on_plane(model, [1.0], lambda: {n: p - before[n] for n, p in weights(model).items()}, seed)
        return a

    first = moves(0)
    for name, step in first.items():
        if "embed_tokens" not in name and step.numel() > 100:  # at right angles, nearly: sqrt(2) times the norm
            assert 1.2 < step.norm() / before[name].norm() < 1.6
    assert all(torch.equal(step, again) for step, again in zip(first.values(), moves(0).values()))
    assert not torch.equal(first["model.norm.weight"], moves(1)["model.norm.weight"])
    [[still]] = trajectory.on_plane(model, [0.0], lambda: weights(model))
    assert all(torch.equal(before[name], weight) for name, weight in still.items())


# ---------------------------------------------------------------------------------------------------------------------
# Prune
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("27};\\boxed{3}", "\\boxed{27}"),
        ("\\frac{1}{2}} or so", "\\boxed{\\frac{1}{2}}"),
        ("2 and on and", "\\boxed{2 and on and"),
        ("", "\\boxed{"),
    ],
)
def test_only_the_first_complete_answer_counts(text, expected):
    """A model that is not stopped writes on, and its next box is not the answer that it was asked for."""
    assert trajectory.complete_answer("\\boxed{", text) == expected


def test_pruning_keeps_the_beginning():
    """The last tenth of the thinking nearly says the answer: kept instead, it makes all the rest look idle."""
    ids = [11, 12, 13, 14, 15]
    kept = [trajectory.first_part(ids, share) for share in (0, 10, 50, 100)]
    assert kept == [[], [11], [11, 12, 13], ids]


def test_answers_come_from_the_beginning_of_the_thinking(monkeypatch):
    asked = []

    def sample(model, tokenizer, prompts, n, length, temperature, tokens_at_once):
        asked.extend(prompts)
        assert (n, temperature, tokens_at_once) == (1, 0.0, args.max_rollout_tokens)
        return common.Rollouts(None, None, None, None, texts=["3}", "4};\\boxed{7}"])

    monkeypatch.setattr(common, "sample", sample)
    problems = [tasks.Problem("", "3", ids=[7]), tasks.Problem("", "7", ids=[8, 9])]
    found = [trajectory.Trajectory(p, [1, 2, 3, 4, 5], [], True) for p in problems]
    args = trajectory.parse(["prune", "embedded", "--cue", "\\boxed{ANSWER}"])
    assert trajectory.answer_from(None, TOKENIZER, found, [[1, 2], [1]], args) == [1.0, 0.0]
    [cue] = TOKENIZER("\\boxed{")["input_ids"]
    assert asked == [[7, 1, 2, cue], [8, 9, 1, cue]]


# ---------------------------------------------------------------------------------------------------------------------
# Behaviours
# ---------------------------------------------------------------------------------------------------------------------


def answers(*counts):
    """Rows of completions.jsonl: (step, text, reward)."""
    return [dict(step=step, text=text, reward=reward, length=len(text)) for step, text, reward in counts]


def test_behaviours_over_steps(tmp_path):
    """Steps are averaged in bins that end at a multiple of --every; an answer cut off by a kill is left out."""
    rows = answers((1, "@1+1;1+1=2?2-1=1;", 1.0), (10, "2", 0.0), (11, "~~", 0.1), (12, "1+1=2", 1.0))
    path = write_jsonl(tmp_path / "completions.jsonl", rows)
    path.write_text(path.read_text() + '{"step": 12, "te')
    first, second = trajectory.read_behaviours(tmp_path, 10)
    assert (first["step"], first["answers"], first["accuracy"], first["length"]) == (10, 2, 0.5, 9.0)
    assert (first["verification"], first["verification_share"], first["subgoal_setting"]) == (0.5, 0.5, 0.5)
    assert (second["step"], second["accuracy"]) == (12, 0.5)
    assert (second["backtracking"], second["backtracking_share"]) == (1, 0.5)


@pytest.mark.parametrize("missing", ["step", "text", "reward", "length"])
def test_a_last_line_without_its_fields_leaves_no_empty_bin(tmp_path, missing):
    first, last = answers((1, "1+1=2", 1.0), (25, "~", 0.0))
    del last[missing]
    path = write_jsonl(tmp_path / "completions.jsonl", [first])
    path.write_text(path.read_text() + json.dumps(last))
    [row] = trajectory.read_behaviours(tmp_path, 10)
    assert (row["step"], row["answers"]) == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------------------


def run_main(*options):
    trajectory.main(trajectory.parse(list(map(str, options))))
    return json.loads(Path(f"runs/trajectory/{options[0]}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of the embedded kind."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(embedded=True, num_hidden_layers=2).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


COMPLETIONS = [
    dict(problem="1+2+3+4=", text="1+2=3;3+3=6;6+4=10;\\boxed{10}", gold="10", reward=1.0, notes="6+4=10;"),
    dict(problem="1+2+3-4=", text="1+2=3;3+3=5;5-4=1;\\boxed{1}", gold="2", reward=0.0, notes="2"),
    dict(problem="1+1+1+1=", text="\\boxed{4}", gold="4", notes=""),  # graded here, without any thinking
]


@pytest.fixture
def completions(tmp_path):
    return write_jsonl(tmp_path / "completions.jsonl", COMPLETIONS)


def assert_figures(*names):
    import matplotlib.image

    for name in names:
        pixels = matplotlib.image.imread(f"runs/trajectory/{name}.png")
        assert min(pixels.shape[:2]) > 300 and pixels.std() > 0.02  # large enough to read, and not blank


def test_descent_command(folder, completions, capsys):
    """Its numbers are those of the probe, for the gold answer, with the right cue in front."""
    result = run_main("descent", folder, "--completions", completions)
    rows = result["trajectories"]
    assert [row["right"] for row in rows] == [True, False]
    assert "1 answer without thinking" in capsys.readouterr().out
    model, _ = load_model(str(folder))
    for row in rows:
        assert len(row["nll"]) == len(row["nll_cut_short"]) == len(row["tokens"]) + 1
    prompt = encode(TOKENIZER, COMPLETIONS[1]["problem"])
    thinking, branch = (TOKENIZER(text)["input_ids"] for text in ("1+2=3;3+3=5;5-4=1;", ";\\boxed{2}"))
    expected = answer_nll(model, prompt, thinking, branch, [0, 0, 1, 1])  # the GOLD answer, also where another came
    assert rows[1]["nll_cut_short"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert set(result["curves"]["nll"]) == {"right", "wrong"}
    assert "delimiter" in result["classes"]
    layers = result["layers"]
    assert len(layers["map"]) == 3
    assert layers["map"][-1] == pytest.approx(rows[0]["nll"], abs=1e-5)
    assert len(layers["first_to_know"]) == len(rows[0]["nll"])
    assert_figures("descent", "classes", "layers")


def writes(*texts):
    """A model that writes these texts, one after the other and over again: what to put in place of common.sample. One
    without its end token was cut off."""

    def sample(model, tokenizer, prompts, n, *settings, **options):
        assert n == 1
        written = [texts[i % len(texts)] for i in range(len(prompts))]
        completions = [tokenizer(text)["input_ids"] for text in written]
        rollouts = common.assemble(prompts, completions, 0, model.device)
        rollouts.finished = torch.tensor([text.endswith("<|end|>") for text in written])
        rollouts.entropy = torch.zeros_like(rollouts.mask)
        rollouts.texts = [text.removesuffix("<|end|>") for text in written]
        return rollouts

    return sample


def test_descent_of_sampled_trajectories(folder, data, monkeypatch):
    """The end token is no thinking, and an answer that was cut off has none to lose. Golds are 3 and 7 in turn."""
    answers = ("so \\boxed{3}<|end|>", "so \\boxed{3}<|end|>", "\\boxed{3}<|end|>", "so, so")
    monkeypatch.setattr(common, "sample", writes(*answers))
    result = run_main("descent", folder, "--data", data, "--end_of_thinking", "", "--layers", 0)
    assert set(result["curves"]) == {"nll"}
    assert result["layers"] is None
    rows = result["trajectories"]
    assert ["".join(row["tokens"]) for row in rows] == ["so ", "so ", "so, so"] * 3  # the third one does not think
    assert [row["right"] for row in rows] == [True, False, False] * 3


def test_trajectories_are_those_of_held_out_problems(folder, monkeypatch):
    """On problems that were trained on, the answer may be known before any thinking."""
    monkeypatch.setattr(common, "sample", writes("so \\boxed{3}<|end|>"))
    args = trajectory.parse(["descent", str(folder), "--num_samples", "2"])
    found = trajectory.sample_trajectories(*load_model(str(folder)), args)
    expected = tasks.load_problems("arithmetic", "test", 2)
    assert [one.problem.prompt for one in found] == [problem.prompt for problem in expected]


QUARTILES = {"nll": {"right": dict(trajectories=3, quartiles=[[0.1, 0.5, 0.9]] * trajectory.GRID)}}


def test_the_curve_of_the_descent_is_the_median():
    """In the table and in the figure: a few trajectories that never get there would lift a mean off the others."""
    line = trajectory.descent_table(QUARTILES, {}, {}, None).splitlines()[2]
    assert line.split() == ["nll,", "right", "(3)"] + ["0.500"] * 5
    args = trajectory.parse(["descent", "embedded"])
    axis = trajectory.draw_descent(QUARTILES, {}, args).axes[0]
    assert set(axis.lines[0].get_ydata()) == {0.5}


def test_the_typical_heat_map_is_a_median():
    """One right trajectory whose raw streams are off by tens of nats must not paint the map alone."""
    problems = thinking_aloud("1+2=", *["ab"] * 4)
    problems[3].right = False
    maps = {i: torch.full((2, 3), loss) for i, loss in enumerate((1.0, 2.0, 90.0, 50.0))}
    layers = trajectory.summarize_layers(problems, maps, shown=0)
    assert layers["typical"] == [[2.0] * trajectory.GRID] * 2
    assert layers["typical_of"] == 3


def thinking_aloud(prompt, *thoughts):
    """Trajectories of the embedded tokenizer with this prompt and these thoughts."""
    problem = tasks.Problem(prompt, "3", ids=TOKENIZER(prompt)["input_ids"])
    return [trajectory.Trajectory(problem, TOKENIZER(text)["input_ids"], list(text), True) for text in thoughts]


def test_an_end_of_thinking_ends_what_was_begun():
    """The templates of some models close the thinking themselves unless told otherwise: cutting it short by another
    </think> shows what the model makes of a broken text."""
    check = trajectory.check_end_of_thinking
    check(TOKENIZER, thinking_aloud("q<think>", "a", "b"), "\n</think>\n")
    check(TOKENIZER, thinking_aloud("q", "a", "<think>b"), "\n</think>\n")  # it thinks on its own account
    check(TOKENIZER, thinking_aloud("q", "a", "b"), ";")
    with pytest.raises(UserError, match="no trajectory has an open <think>.*enable_thinking"):
        check(TOKENIZER, thinking_aloud("q<think></think>", "a", "b"), "\n</think>\n")


def test_landscape_command(model_folder, data, monkeypatch):
    monkeypatch.setattr(common, "sample", writes("so \\boxed{3}<|end|>"))  # right every other time
    result = run_main("landscape", model_folder, "--data", data, "--points", 3)
    assert result["offsets"] == [-1, 0, 1]
    assert result["problems"] == 6
    for surface in result["surfaces"].values():  # a trained model sits in a valley
        assert surface[1][1] == min(min(row) for row in surface)
    assert_figures("landscape")


def test_the_first_direction_of_the_landscape_is_horizontal(monkeypatch):
    """As its axes are named. Here the loss rises along the first direction only."""
    drawn = []
    real = Axes.contourf

    def contourf(axis, x, y, z, **settings):
        drawn.append(z)
        return real(axis, x, y, z, **settings)

    monkeypatch.setattr(Axes, "contourf", contourf)
    surface = [[0.0] * 3, [1.0] * 3, [2.0] * 3]
    result = dict(offsets=[-1, 0, 1], problems=1, surfaces=dict(at_once=surface, behind_thinking=surface))
    trajectory.draw_landscape(result, None)
    assert [list(row) for row in drawn[0]] == [[0.0, 1.0, 2.0]] * 3


def test_prune_command(model_folder, data, completions):
    result = run_main("prune", model_folder, "--completions", completions, "--percent", 50, 100, "--summary", "notes")
    assert [row["kept"] for row in result["rows"]] == ["50%", "100%", "summary"]
    tokens = [row["tokens"] for row in result["rows"]]
    assert tokens == [pytest.approx((10 + 9 + 0) / 3), pytest.approx((19 + 18 + 0) / 3), pytest.approx((7 + 1) / 3)]
    assert result["own_accuracy"] == pytest.approx(2 / 3)
    result = run_main("prune", model_folder, "--data", data, "--max_completion_length", 10, "--percent", 0)
    assert 0.2 < result["rows"][0]["accuracy"] <= 1  # it knows nothing but 3 and 7, and half the answers are either
    assert_figures("prune")


def test_right_is_what_the_verdict_says(tmp_path):
    """With --reward random a coin decides the reward: read as correctness, it would explain whatever is measured."""
    answer = dict(step=1, text="", reward=1.0, length=2)
    assert trajectory.is_right(answer) and not trajectory.is_right(answer | dict(reward=0.1))
    assert trajectory.is_right(answer | dict(reward=0.0, verdict="right"))
    given = [("wrong", 1.0), ("right", 0.0), ("error", 1.0)]
    rows = [answer | dict(verdict=verdict, reward=reward) for verdict, reward in given]
    write_jsonl(tmp_path / "completions.jsonl", rows)
    [row] = trajectory.read_behaviours(tmp_path, 10)
    assert row["accuracy"] == pytest.approx(1 / 3)


def test_behaviours_command(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "completions.jsonl", answers((1, "?1=1;", 1.0), (25, "Wait, no.", 0.0)))
    result = run_main("behaviours", "a", "b", "--every", 5)
    assert list(result["runs"]) == ["a", "b"]
    assert [row["step"] for row in result["runs"]["a"]] == [1, 25]
    assert result["runs"]["b"][1]["backtracking"] > 0
    assert "1.00 (100%)" in capsys.readouterr().out
    assert_figures("behaviours")


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong
# ---------------------------------------------------------------------------------------------------------------------


def nobody_knows(pairs, timeout=3.0):
    """A verifier that is broken: what to put in place of verifier.compare."""
    return ["error"] * len(pairs)


def test_sampled_trajectories_without_verdicts_stop(folder, data, monkeypatch):
    """All trajectories were wrong, said the table, and nothing said that it was the verifier's."""
    monkeypatch.setattr(common, "sample", writes("so \\boxed{3}<|end|>"))
    monkeypatch.setattr(verifier, "compare", nobody_knows)
    with pytest.raises(UserError, match="no verdict on too many of 12 answers: 12 error"):
        run_main("descent", folder, "--data", data)
    result = run_main("descent", folder, "--data", data, "--max_grader_errors", 1)
    assert not any(row["right"] for row in result["trajectories"])


def test_completions_without_rewards_or_verdicts_stop(folder, completions, monkeypatch):
    """One of the three has no reward of its own and is graded here."""
    monkeypatch.setattr(verifier, "compare", nobody_knows)
    with pytest.raises(UserError, match="completions.jsonl: no verdict on too many of 3 answers: 1 error"):
        run_main("descent", folder, "--completions", completions)


def test_pruning_without_verdicts_stops(folder, completions, monkeypatch):
    """Accuracy fell to 0.000 at every share of the thinking, with exit status 0."""
    rewarded = write_jsonl(completions.with_name("rewarded.jsonl"), COMPLETIONS[:2])
    monkeypatch.setattr(common, "sample", writes("3}", "4}"))
    monkeypatch.setattr(verifier, "compare", nobody_knows)
    options = ("prune", folder, "--completions", rewarded, "--percent", 50)
    with pytest.raises(UserError, match="the shortened thinking: no verdict on too many of 2 answers: 2 error"):
        run_main(*options)
    assert run_main(*options, "--max_grader_errors", 1)["rows"][0]["accuracy"] == 0


@pytest.mark.parametrize("command", ["descent", "prune", "landscape", "behaviours"])
def test_what_is_shown_is_in_the_folder(command, folder, completions, monkeypatch, capsys):
    """A full disk left a table on the screen that no file held."""
    options = {
        "descent": [folder, "--completions", completions],
        "prune": [folder, "--completions", completions],
        "landscape": [folder, "--completions", completions, "--points", 3],
        "behaviours": [completions.parent],
    }
    if command == "behaviours":
        write_jsonl(completions, answers((1, "1=1;", 1.0)))
    tables = {"descent": "token class", "prune": "of right", "landscape": "on the plane", "behaviours": "per answer"}

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(figures, "save_figures", fail)
        with pytest.raises(OSError):
            run_main(command, *options[command])
    assert tables[command] not in capsys.readouterr().out
    run_main(command, *options[command])
    assert tables[command] in capsys.readouterr().out
