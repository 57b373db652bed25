"""Scripts as users meet them: one real command each, what it leaves behind, and every way to hold it wrong."""

import json
import runpy
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, TOKENIZER, arguments, command_line, read_jsonl, run_script, tiny_model, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import bookkeeping
import bupo
import common
import grpo
import sft

ALGORITHMS = ["grpo.py", *(name for name in ("bupo.py", "opo.py", "em.py") if (ROOT / name).exists())]
SCRIPTS = ["sft.py", *ALGORITHMS]


def options_of(script, model_folder, data, **overrides):
    """The command line of a two-step run of a script into the folder 'run'."""
    module = runpy.run_path(str(ROOT / script))  # without its __main__ block: only to know its fields
    names = {field.name for field in fields(module["Args"])}
    settings = SMALL | dict(model=model_folder, data=data, eval_data=data, output_dir="run") | overrides
    return command_line(**{name: value for name, value in settings.items() if name in names})


def run_in_process(script, options, monkeypatch):
    """`python script options` without the seconds a new interpreter takes to start -> exit status."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind
# ---------------------------------------------------------------------------------------------------------------------

RECORD = set(
    "step phase reward accuracy response_length entropy trained_entropy grad_norm zero_variance_share truncated_share "
    "logp_gap tokens_per_second seconds seconds_by_stage peak_memory_gb".split()
)
ANSWER = set("step problem text answer reward advantage length finished".split())


def weights(folder):
    """The tensors of a model folder, loaded as anybody would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


PROMPTS = {script: 1 if script == "em.py" else 12 if script == "sft.py" else 6 for script in SCRIPTS}


@pytest.fixture(scope="module")
def commands(request, model_folder, data, tmp_path_factory):
    """The command of every script asked for, two at a time, since each takes seconds to start: script -> (its folder,
    its end as a future)."""
    rows = [{"problem": row["problem"], "response": f"\\boxed{{{row['answer']}}}"} for row in read_jsonl(data)]
    sources = {"sft.py": write_jsonl(tmp_path_factory.mktemp("data") / "trajectories.jsonl", rows)}
    started = {}
    with ThreadPoolExecutor(2) as pool:
        for script in SCRIPTS:
            if any(script in item.name and "commands" in item.fixturenames for item in request.session.items):
                settings = dict(eval_data=data, num_prompts=PROMPTS[script], save_steps=1, eval_steps=1)
                options = options_of(script, model_folder, sources.get(script, data), **settings)
                folder = tmp_path_factory.mktemp("command")
                started[script] = folder, pool.submit(run_script, script, *options, folder=folder)
        yield started


def finished(script, commands, monkeypatch):
    """Wait for a script's command, and go where it ran."""
    folder, end = commands[script]
    assert end.result().returncode == 0, end.result().stderr
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("script", ALGORITHMS)
def test_command_leaves_everything_behind(script, commands, model_folder, monkeypatch):
    """Scripts break at the seams: options nobody parses, files nobody writes, a model nothing else can load."""
    finished(script, commands, monkeypatch)
    run = Path("run")
    assert {path.name for path in Path().iterdir()} == {"run"}
    assert json.loads((run / "args.json").read_text())["max_steps"] == 2

    records = read_jsonl(run / "metrics.jsonl")
    steps = [record for record in records if "reward" in record]
    assert [record["step"] for record in steps] == [1, 2]
    for record in steps:
        assert RECORD <= set(record)
        internal = script == "bupo.py" and record["step"] == 1
        assert record["phase"] == ("internal" if internal else "whole")
        assert record["logp_gap"] is None if internal else record["logp_gap"] < 1e-5
        assert record["grad_norm"] > 0 and record["entropy"] > 0 and record["trained_entropy"] > 0
        assert abs(record["seconds"] - sum(record["seconds_by_stage"].values())) < 1e-6
    evaluations = [record for record in records if "eval_accuracy" in record]
    assert [record["step"] for record in evaluations] == [0, 1, 2]
    assert evaluations[0]["kl_to_start"] == 0 and all(record["kl_to_start"] > 0 for record in evaluations[1:])
    assert all(0 <= record["eval_greedy_accuracy"] <= 1 for record in evaluations)

    answers = read_jsonl(run / "completions.jsonl")
    assert len(answers) == 2 * 4 * PROMPTS[script]
    for answer in answers:
        assert ANSWER <= set(answer)
        assert answer["answer"] == common.last_boxed(answer["text"])
    for record in steps:
        own = [answer["reward"] for answer in answers if answer["step"] == record["step"]]
        assert record["reward"] == pytest.approx(sum(own) / len(own))

    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    start, first, final = (weights(folder) for folder in (model_folder, run / "checkpoint-1", run))
    assert not same(start, first) and not same(first, final)
    for folder in (run / "checkpoint-1", run):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False) == "<|user|>1"
        assert json.loads((folder / "config.json").read_text())["embedded"] is True
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("script", ["sft.py"])
def test_imitation_command_leaves_everything_behind(script, commands, model_folder, data, monkeypatch):
    """The one script without rewards: it must learn from trajectories, and leave a model the others can start from."""
    finished(script, commands, monkeypatch)
    records = [record for record in read_jsonl("run/metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == [1, 2]
    assert records[1]["loss"] < records[0]["loss"]  # the same twelve trajectories twice
    assert {"grad_norm", "seconds", "peak_memory_gb"} <= set(records[0])
    start, first, final = (weights(folder) for folder in (model_folder, "run/checkpoint-1", "run"))
    assert not same(start, first)
    AutoTokenizer.from_pretrained("run")
    grpo.main(arguments(grpo, "run", data, output_dir="next", max_steps=1))


def test_the_embedded_model_is_built_once(monkeypatch):
    """`python grpo.py` with nothing at hand builds its model, or finishes one that was interrupted; then it is kept."""
    arithmetic = common.arithmetic
    monkeypatch.setattr(common, "arithmetic", lambda split, n, seed=0: arithmetic(split, min(n, 40), seed))
    monkeypatch.setattr(sft, "EMBEDDED", sft.EMBEDDED | dict(max_steps=3, num_prompts=4, save_steps=1))
    settings = {k: v for k, v in (grpo.EMBEDDED | SMALL).items() if k in grpo.Args.__dataclass_fields__}
    real_save, saved = bookkeeping.Run.save, []

    def save(run, step):
        saved.append(step)
        run.stop_signal = signal.SIGINT if saved == [1, 2] else None
        real_save(run, step)

    monkeypatch.setattr(bookkeeping.Run, "save", save)
    with pytest.raises(SystemExit):
        grpo.main(grpo.Args(**settings | dict(output_dir="one")))
    assert not Path("one").exists()
    grpo.main(grpo.Args(**settings | dict(output_dir="one")))
    assert saved == [1, 2, 3, 1, 2]  # built in 2 + 1 steps, then trained in 2
    stamp = Path("runs/tiny/model.safetensors").stat().st_mtime_ns
    grpo.main(grpo.Args(**settings | dict(output_dir="two")))
    assert Path("runs/tiny/model.safetensors").stat().st_mtime_ns == stamp
    assert Path("two/model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_every_option(script, monkeypatch, capsys):
    """A literal % in one help text breaks --help as a whole; an option without help or default is a riddle."""
    assert run_in_process(script, ["--help"], monkeypatch) == 0
    text = " ".join(capsys.readouterr().out.split())
    module = runpy.run_path(str(ROOT / script))
    for field in fields(module["Args"]):
        assert f"--{field.name}" in text
        assert len(field.metadata["help"]) > 10
    for value in (module["EMBEDDED"]["learning_rate"], module["Args"]().weight_decay):
        assert f"(default: {value})" in text  # the embedded model's where it has its own


def test_a_percent_sign_in_a_help_text_is_fine(capsys):
    """argparse takes '50% of' for a format: ValueError, and no help at all."""

    @dataclass
    class Args:
        model: str = common.option("embedded", "which model, 100%")
        share: float = common.option(0.5, "50% of what %s or %(default)s would be")

    with pytest.raises(SystemExit) as end:
        common.parse(Args, {}, ["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "which model, 100%" in text and "50% of what %s or %(default)s would be" in text


def test_embedded_defaults_are_for_the_embedded_model_only(model_folder, tmp_path):
    """Laptop settings on a real model, or a paper's settings on a laptop: whose defaults hold depends on --model."""
    tiny_model().save_pretrained(tmp_path / "other")  # carries no mark
    laptop, paper = grpo.EMBEDDED["learning_rate"], grpo.Args().learning_rate
    assert laptop != paper
    for options, expected in (
        (["--seed", "1"], laptop),
        (["--model", "embedded"], laptop),
        (["--model", str(model_folder)], laptop),  # trained from it
        (["--model", str(tmp_path / "other")], paper),
        (["--model", "owner/name"], paper),
        (["--model", str(model_folder), "--learning_rate", "0.5"], 0.5),
        (["--model", str(tmp_path / "other"), "--learning_rate", "0.5"], 0.5),
    ):
        assert common.parse(grpo.Args, grpo.EMBEDDED, options).learning_rate == expected
    args = vars(common.parse(grpo.Args, grpo.EMBEDDED, []))
    assert grpo.EMBEDDED.items() <= args.items()


def test_the_defaults_are_the_papers():
    """A default changed in passing makes every run of this repository another experiment than the paper's."""
    args = bupo.Args()
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (1e-6, 0.01, 1.0)
    assert (args.num_prompts, args.num_generations, args.num_minibatches) == (128, 8, 4)
    assert (args.epsilon, args.epsilon_high, args.delta, args.beta) == (0.2, None, 10.0, 0.0)
    assert (args.internal_layer, args.internal_steps, args.internal_norm, args.temperature) == (5, 30, False, 1.0)
    trunk = {name: value for name, value in vars(grpo.Args()).items() if name != "output_dir"}
    assert trunk.items() <= vars(args).items()


# (script, options that replace the good ones, what the message must name)
MISTAKES = [
    ("grpo.py", {"lerning_rate": "1"}, "--lerning_rate"),
    ("grpo.py", {"learning": "1"}, "--learning"),  # no abbreviations: a new option would change what they mean
    ("sft.py", {"num_generations": "4"}, "--num_generations"),
    ("grpo.py", {"max_steps": "many"}, "max_steps"),
    ("grpo.py", {"advantage": "best"}, "advantage"),
    ("grpo.py", {"overwrite": "maybe"}, "overwrite"),
    ("grpo.py", {"learning_rate": "-1"}, "--learning_rate"),
    ("grpo.py", {"learning_rate": "nan"}, "--learning_rate"),
    ("grpo.py", {"num_prompts": "0"}, "--num_prompts"),
    ("grpo.py", {"temperature": "0"}, "--temperature"),
    ("grpo.py", {"chat_template_kwargs": "thinking"}, "--chat_template_kwargs"),
    ("grpo.py", {"chat_template_kwargs": "[1]"}, "--chat_template_kwargs"),
    ("grpo.py", {"num_generations": "1"}, "--num_generations"),
    ("grpo.py", {"delta": "1"}, "--delta"),  # the dual clip would cut the policy's own ratio
    ("grpo.py", {"grade_timeout": "0"}, "--grade_timeout"),
    ("grpo.py", {"optimizer_device": "gpu"}, "--optimizer_device"),
    ("grpo.py", {"num_minibatches": "3"}, "--num_minibatches"),
    ("bupo.py", {"internal_layer": "3"}, "--internal_layer"),
    ("bupo.py", {"internal_layer": "-1"}, "--internal_layer"),
    ("bupo.py", {"internal_layer": "first"}, "--internal_layer"),
    ("grpo.py", {"num_prompts": "100"}, "--num_prompts"),
    ("grpo.py", {"max_prompt_length": "2"}, "--max_prompt_length"),
    ("grpo.py", {"data": "missing.jsonl"}, "missing.jsonl"),
    ("grpo.py", {"eval_data": "missing.jsonl", "eval_steps": "1"}, "missing.jsonl"),
    ("grpo.py", {"data": "broken.jsonl"}, "broken.jsonl:1"),
    ("grpo.py", {"data": "binary.jsonl"}, "binary.jsonl:1"),
    ("grpo.py", {"data": "huge.jsonl"}, "--max_prompt_length"),
    ("sft.py", {"data": "broken.jsonl"}, "broken.jsonl:1"),
    ("grpo.py", {"model": "missing/folder"}, "missing/folder"),
    ("grpo.py", {"model": "long" * 80}, "longlong"),
    ("grpo.py", {"data": "long" * 80}, "longlong"),
    ("grpo.py", {"output_dir": "long" * 80}, "longlong"),
    ("sft.py", {"output_dir": "long/" * 999}, "long/long"),
    ("grpo.py", {"model": "empty"}, "empty"),
    ("grpo.py", {"model": "no_tokenizer"}, "tokenizer"),
    ("grpo.py", {"model": "cut_off"}, "cut_off"),
    ("grpo.py", {"model": "gpt2"}, "GPT2LMHeadModel"),  # another architecture
    ("grpo.py", {"output_dir": "file"}, "file"),
    ("sft.py", {"output_dir": "file"}, "file"),
    ("bupo.py", {"output_dir": "file/run"}, "file/run"),
    ("grpo.py", {"report_to": "wandb"}, "--report_to"),
    ("grpo.py", {"device": "cuda"}, "--device"),
    ("grpo.py", {"device": "abacus"}, "abacus"),
    ("grpo.py", {"dtype": "float8"}, "dtype"),
]


@pytest.mark.parametrize("script, wrong, named", MISTAKES, ids=lambda v: "-".join(v) if isinstance(v, dict) else None)
def test_a_mistake_ends_with_one_line(script, wrong, named, model_folder, data, monkeypatch, capfd):
    """A traceback, or an hour before it, for a mistake that one line could have named; and no folder left behind."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    Path("file").write_text("")
    Path("empty").mkdir()
    Path("broken.jsonl").write_text('{"text": "1+2=3"}\n')
    Path("binary.jsonl").write_bytes(bytes(range(256)) * 40)
    Path("huge.jsonl").write_text(json.dumps({"problem": "1+" * 10**5, "answer": "1"}))
    for name in ("no_tokenizer", "cut_off"):
        tiny_model().save_pretrained(name)
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=8, n_layer=1, n_head=1)).save_pretrained("gpt2")
    for name in ("cut_off", "gpt2"):
        TOKENIZER.save_pretrained(name)
    (Path("cut_off") / "model.safetensors").write_bytes((Path("cut_off") / "model.safetensors").read_bytes()[:1000])
    trajectories = write_jsonl(Path("trajectories.jsonl"), [{"prompt": "1", "response": "2"}] * 9)
    before = sorted(Path().rglob("*"))
    options = options_of(script, model_folder, trajectories if script == "sft.py" else data)
    capfd.readouterr()
    assert run_in_process(script, [*options, *command_line(**wrong)], monkeypatch) == 2
    error = capfd.readouterr().err
    lines = error.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], error
    assert sorted(Path().rglob("*")) == before


def test_a_bug_keeps_its_traceback():
    """Only user errors become one line; a bug reported as 'error: 3' could never be found."""
    with pytest.raises(KeyError), common.one_line_errors():
        raise KeyError(3)


def test_a_value_left_out_is_a_mistake(model_folder, data, monkeypatch, capsys):
    """`--seed --output_dir x` and a stray word: argparse's own usage text of two screens is no help."""
    for options in (["--output_dir"], ["12"], ["--seed", "--output_dir", "x"]):
        assert run_in_process("grpo.py", options, monkeypatch) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_training_into_the_model_folder_is_refused(model_folder, data):
    """The run would overwrite the model it starts from, and compare itself with what it has become."""
    with pytest.raises(common.UserError, match="output_dir"):
        grpo.main(arguments(grpo, model_folder, data, output_dir=str(model_folder)))


def test_one_generation_is_fine_without_a_group_baseline(model_folder, data):
    """REINFORCE++ whitens over the batch: a single sample per prompt is its usual setting, not a mistake."""
    settings = dict(num_generations=1, num_prompts=8, max_steps=1, advantage="batch_whitened")
    grpo.main(arguments(grpo, model_folder, data, **settings))
    assert read_jsonl("run/metrics.jsonl")[0]["grad_norm"] > 0


def test_more_internal_steps_than_steps_is_said_and_allowed(model_folder, data, capsys):
    """Phase one for ever is the paper's own ablation; who meant something else is told in one line."""
    bupo.main(arguments(bupo, model_folder, data, internal_steps=50))
    said = [line for line in capsys.readouterr().out.splitlines() if "internal_steps" in line]
    assert len(said) == 1 and "50" in said[0]
    assert [record["phase"] for record in read_jsonl("run/metrics.jsonl")] == ["internal"] * 2


def test_a_gap_between_sampler_and_trainer_is_said(model_folder, data, monkeypatch, capsys):
    """Two code paths that drift apart train another policy than the one sampled: the reward just stays flat."""
    real = common.completion_logps
    monkeypatch.setattr(common, "completion_logps", lambda *a, **k: (lambda l, e: (l - 0.3, e))(*real(*a, **k)))
    grpo.main(arguments(grpo, model_folder, data, num_prompts=6))
    assert "warning" in capsys.readouterr().err
    assert read_jsonl("run/metrics.jsonl")[0]["logp_gap"] == pytest.approx(0.3, abs=1e-4)


def test_a_batch_without_signal_takes_no_step(model_folder, data):
    """All rewards equal: weight decay and old moments alone would move the weights, on no evidence at all."""
    rows = [{"problem": row["problem"], "answer": "5"} for row in read_jsonl(data)]  # which the model never says
    path = write_jsonl(Path("unsolvable.jsonl"), rows)
    grpo.main(arguments(grpo, model_folder, path, weight_decay=0.1))
    assert same(weights(model_folder), weights("run"))
    for record in read_jsonl("run/metrics.jsonl"):
        assert record["zero_variance_share"] == 1.0 and record["optimizer_steps"] == 0 and record["grad_norm"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Longer than a test should take
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_but_python_learns_something():
    """The first command of the README, in an empty folder: the model is built, trained, and better afterwards."""
    done = run_script("grpo.py", timeout=3600)
    assert done.returncode == 0, done.stderr
    accuracy = [r["eval_accuracy"] for r in read_jsonl("runs/grpo/metrics.jsonl") if "eval_accuracy" in r]
    assert accuracy[0] < 0.5 and accuracy[-1] > accuracy[0] + 0.2
