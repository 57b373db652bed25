"""What users get wrong, and the one line that each mistake ends with: it names the option, file, line or folder.

A new mistake is a row more in one of the tables. All commands run in a folder with the files of `workshop`, and none
may change or leave anything there.
"""

import importlib
import json
import os
import random
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, TOKENIZER, arguments, command_line, tiny_model, write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel

import analyze_entropy
import analyze_trajectory
import bookkeeping
import bupo
import sft
import tasks
from plumbing.errors import UserError, one_line_errors
from plumbing.models import tokenize_problems
from tasks import data_files

# ---------------------------------------------------------------------------------------------------------------------
# Files to get wrong
# ---------------------------------------------------------------------------------------------------------------------

ANSWERS = [
    dict(problem="1+2+3+4=", text="1+2=3;3+3=6;6+4=10;\\boxed{10}", gold="10", reward=1.0, notes="6+4=10;"),
    dict(problem="1+2+3-4=", text="1+2=3;3+3=5;5-4=1;\\boxed{1}", gold="2", reward=0.0, notes="2"),
    dict(problem="1+1+1+1=", text="\\boxed{4}", gold="4", notes=""),
]
# Names of outputs that a folder bears, each in a folder of its own under folders/.
OCCUPIED = (
    *("results.json", "results.md", "pass_at_k.png", "temperatures.png", "training_curves.png"),
    *(
        "entropy.json",
        "lens.json",
        "patching.json",
        "alignment.json",
        "1_flow.png",
        "3_answer_model.png",
        "descent.json",
        "layers.png",
        "prune.png",
    ),
    *("landscape.json", "behaviours.png", "logits.json", "gradient_variance.png"),
)
LOGGED = dict(step=1, text="", reward=0.0, length=0)  # of completions.jsonl, as far as it is counted


def make_data(folder):
    """Data files, most of them wrong."""
    write_jsonl(folder / "trajectories.jsonl", [dict(prompt="1", response="2")] * 9)
    write_jsonl(folder / "broken.jsonl", [dict(text="1+2=3")])
    (folder / "binary.jsonl").write_bytes(bytes(range(256)) * 40)
    write_jsonl(folder / "huge.jsonl", [dict(problem="1+" * 10**5, answer="1")])
    (folder / "empty.jsonl").write_text("\n\n")
    write_jsonl(folder / "answers.jsonl", ANSWERS)
    write_jsonl(folder / "bare.jsonl", [dict(problem="1+1=", text="\\boxed{2}", gold="2")])
    (folder / "file").touch()
    (folder / "empty").mkdir()


def make_models(folder):
    """Model folders: one that is whole but not of the embedded kind, and three that cannot be used."""
    for name in ("whole", "no_tokenizer", "cut_off"):
        tiny_model().save_pretrained(folder / name)
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder / "gpt2")
    for name in ("whole", "cut_off", "gpt2"):
        TOKENIZER.save_pretrained(folder / name)
    cut(folder / "cut_off/model.safetensors")


def cut(path):
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_jsonl_in(folder, rows):
    """A run folder with nothing but these answers."""
    folder.mkdir()
    write_jsonl(folder / "completions.jsonl", rows)


def make_runs(folder):
    """Run folders: an interrupted run, the same with something broken, other programs' checkpoints, bare logs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(bookkeeping.Run, "catch_signals", lambda run: setattr(run, "stop_signal", signal.SIGINT))
        with pytest.raises(SystemExit):
            bupo.main(arguments(bupo, "model", "problems.jsonl", output_dir="runs/interrupted"))
    runs = folder / "runs"
    for name in ("optimizer.pt", "trainer_state.json", "model.safetensors"):
        shutil.copytree(runs / "interrupted", runs / f"damaged_{name}")
        cut(runs / f"damaged_{name}/checkpoint-1/{name}")
    for name, step in (("text", "one"), ("float", 1.5), ("null", None)):
        shutil.copytree(runs / "interrupted", runs / f"step_{name}")
        (runs / f"step_{name}/checkpoint-1/trainer_state.json").write_text(json.dumps({"step": step}))
    shutil.copytree(runs / "interrupted", runs / "killed")
    (runs / "killed/checkpoint-1").rename(runs / "killed/checkpoint-1.tmp")
    write_jsonl_in(runs / "step_1.5", [LOGGED | dict(step=1.5)])
    write_jsonl_in(runs / "step_huge", [LOGGED | dict(step=10**400)])
    write_jsonl_in(runs / "reward_text", [LOGGED | dict(reward="1")])
    for name, value in (("step", "3"), ("step", None), ("reward", [1]), ("reward", None), ("text", 7), ("length", "2")):
        write_jsonl_in(runs / f"{name}_is_{type(value).__name__}", [LOGGED, LOGGED | {name: value}])
    (runs / "deep").mkdir()
    (runs / "deep/completions.jsonl").write_text("[" * 100_000 + "\n")
    for name, args in (("args_list", []), ("args_short", dict(data="x"))):
        shutil.copytree(folder / "whole", runs / name)
        (runs / f"{name}/args.json").write_text(json.dumps(args))
        (runs / f"{name}/trainer_state.json").write_text('{"step": 1}')
    for name in OCCUPIED:
        (folder / "folders" / name / name).mkdir(parents=True)
    shutil.copytree(runs / "args_short", runs / "args_text")
    (runs / "args_text/args.json").write_text("no json")
    (folder / "folders/samples").mkdir()
    (folder / "folders/samples/samples").touch()
    (folder / "folders/kept/samples/model--arithmetic--T1.jsonl").mkdir(parents=True)
    shutil.copytree(runs / "interrupted", runs / "begun")
    shutil.rmtree(runs / "begun/checkpoint-1")
    (runs / "occupied/curves.png").mkdir(parents=True)
    (folder / "dangling").symlink_to("nowhere")
    (runs / "foreign/checkpoint-500").mkdir(parents=True)
    (runs / "foreign/checkpoint-500/trainer_state.json").write_text('{"global_step": 500}')
    for name, lines in (("silent", ""), ("garbled", json.dumps(LOGGED) + '\n{"step": 2}\n')):
        (runs / name).mkdir()
        (runs / f"{name}/completions.jsonl").write_text(lines)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, model_folder, data):
    """A folder with a trained model, problems, and everything that can be wrong with a file or a folder."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "model").symlink_to(model_folder)
    (folder / "problems.jsonl").symlink_to(data)
    make_data(folder)
    make_models(folder)
    make_runs(folder)
    return folder


@pytest.fixture
def here(workshop, tmp_path, monkeypatch):
    """The current folder, with links to all that is in the workshop, on a machine without GPU and wandb."""
    for path in workshop.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)


def snapshot():
    """Of every folder from here on, the files in it and when they were changed."""
    found = {}
    for folder, _, names in os.walk(".", followlinks=True):
        paths = [Path(folder, name) for name in names]
        found[folder] = {path.name: path.stat().st_mtime_ns for path in paths if path.exists()}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------

# A training script's options that replace or follow good ones, and what the line must hold.
BESIDE_GOOD_OPTIONS = [
    # options and values
    ("grpo.py --lerning_rate 1", "--lerning_rate"),
    ("grpo.py --learning 1", "--learning"),  # no abbreviations: a new option would change what they mean
    ("opo.py --delta 2", "--delta"),  # another script's option
    ("em.py --epsilon 0.2", "--epsilon"),
    ("sft.py --num_generations 4", "--num_generations"),
    ("grpo.py --output_dir", "--output_dir"),  # a value left out
    ("grpo.py --seed --output_dir x", "--seed"),
    ("grpo.py 12", "12"),
    ("grpo.py --max_steps many", "max_steps"),
    ("grpo.py --advantage best", "advantage"),
    ("grpo.py --overwrite maybe", "overwrite"),
    ("grpo.py --learning_rate -1", "--learning_rate"),
    ("grpo.py --learning_rate nan", "--learning_rate"),
    ("grpo.py --num_prompts 0", "--num_prompts"),
    ("grpo.py --temperature 0", "--temperature"),
    ("grpo.py --chat_template_kwargs thinking", "--chat_template_kwargs"),
    ("grpo.py --chat_template_kwargs [1]", "--chat_template_kwargs"),
    ("grpo.py --num_generations 1", "--num_generations"),
    ("grpo.py --delta 1", "--delta"),  # the dual clip would cut the policy's own ratio
    ("grpo.py --grade_timeout 0", "--grade_timeout"),
    ("grpo.py --optimizer_device gpu", "--optimizer_device"),
    ("grpo.py --num_minibatches 3", "--num_minibatches"),
    ("grpo.py --lerning_rate 1", "did you mean --learning_rate?"),
    # numbers that no machine can work with
    ("grpo.py --learning_rate inf", "--learning_rate inf: must be at most"),
    ("grpo.py --temperature 1e-300", "--temperature 1e-300: must be at least 0.01"),
    ("em.py --temperature 1e-300", "--temperature 1e-300: must be at least 0.01"),
    ("grpo.py --grade_timeout inf", "--grade_timeout inf: must be at most 3600"),
    ("grpo.py --grade_timeout 1e300", "--grade_timeout"),
    ("grpo.py --grade_timeout 1e-7", "--grade_timeout 1e-07: must be at least 0.01"),
    ("grpo.py --seed 99999999999999999999", "--seed 99999999999999999999: must be at most"),
    ("grpo.py --max_completion_length 99999999999", "--max_completion_length 99999999999: must be at most"),
    ("grpo.py --max_rollout_tokens 99999999999999999999999", "--max_rollout_tokens"),
    ("grpo.py --num_generations 1000000000", "2000000000 answers a step"),
    ("grpo.py --num_generations 100000 --num_prompts 12", "1200000 answers a step"),
    ("grpo.py --eval_samples 1000000000", "--eval_samples 1000000000: must be at most"),
    ("em.py --select 2 --num_prompts 4", "--select 2: choose --num_prompts 4 or more"),
    ("grpo.py --device meta", "--device meta: holds shapes"),
    ("grpo.py --data arithmetic --eval_data arithmetic --eval_steps 1 --eval_problems 1000000", "61,431 problems"),
    ("sft.py --data arithmetic --problems 2000000", "426,243 problems"),
    ("bupo.py --internal_layer 3", "--internal_layer"),
    ("bupo.py --internal_layer -1", "--internal_layer"),
    ("bupo.py --internal_layer first", "--internal_layer"),
    ("bupo.py --train_blocks 2:3", "--train_blocks 2:3: phase one trains no block above 1"),
    ("grpo.py --train_blocks 1:4", "--train_blocks 1:4: this model has blocks 0 to 2"),
    ("sft.py --train_blocks 1", "--train_blocks 1: this model has blocks 0 to 2"),
    ("grpo.py --lr_below 4:0.1", "--lr_below 4:0.1: this model has blocks 0 to 2"),
    ("grpo.py --reward none", "reward"),
    ("em.py --prompt_index 12", "--prompt_index"),
    ("em.py --select 13", "--select"),
    ("grpo.py --num_prompts 100", "--num_prompts"),
    ("grpo.py --max_prompt_length 2", "--max_prompt_length"),
    ("grpo.py --report_to wandb", "--report_to"),
    ("grpo.py --device cuda", "--device"),
    ("grpo.py --device abacus", "abacus"),
    ("grpo.py --dtype float8", "dtype"),
    # problems and models
    ("grpo.py --data missing.jsonl", "missing.jsonl"),
    ("grpo.py --data EMPTY", "--data '': names nothing"),
    ("grpo.py --data /dev/zero", "/dev/zero:1: a line of more than"),
    ("grpo.py --model EMPTY", "--model '': names nothing"),
    ("grpo.py --model problems.jsonl", "--model problems.jsonl: is a file"),
    ('grpo.py --chat_template_kwargs {"tokenize":false}', "--chat_template_kwargs: tokenize is not for the template"),
    ("grpo.py --data no/such/set", "no/such/set"),
    ("grpo.py --data empty", "empty: cannot be read"),
    ("grpo.py --data empty.jsonl", "empty.jsonl: holds no problem"),
    ("grpo.py --data hf://datasets/owner", "hf://datasets/owner"),
    ("grpo.py --data hf://datasets/o/n/f.jsonl", "hf://datasets/o/n/f.jsonl"),
    ("grpo.py --data LONG", "longlong"),
    ("grpo.py --eval_data missing.jsonl --eval_steps 1", "missing.jsonl"),
    ("grpo.py --data broken.jsonl", "broken.jsonl:1"),
    ("grpo.py --data binary.jsonl", "binary.jsonl:1"),
    ("grpo.py --data huge.jsonl", "--max_prompt_length"),
    ("sft.py --data broken.jsonl", "broken.jsonl:1"),
    ("sft.py --data empty.jsonl", "empty.jsonl: holds no trajectory"),
    ("sft.py --behaviours verification", "--behaviours: is for built-in"),
    ("sft.py --problems 3", "--problems: is for built-in"),
    ("grpo.py --model missing/folder", "missing/folder"),
    ("grpo.py --model LONG", "longlong"),
    ("grpo.py --model empty", "empty"),
    ("grpo.py --model no_tokenizer", "tokenizer"),
    ("grpo.py --model cut_off", "cut_off"),
    ("grpo.py --model gpt2", "GPT2LMHeadModel"),  # another architecture
    # the run folder
    ("grpo.py --output_dir LONG", "longlong"),
    ("sft.py --output_dir DEEP", "long/long"),
    ("grpo.py --output_dir file", "file"),
    ("sft.py --output_dir file", "file"),
    ("bupo.py --output_dir file/run", "file/run"),
    ("em.py --output_dir file", "--output_dir file: file is no folder"),
    ("grpo.py --output_dir /dev/null", "/dev/null is no folder"),
    ("grpo.py --output_dir dangling", "dangling is no folder"),
    ("grpo.py --output_dir dangling/below", "dangling is no folder"),
    ("grpo.py --output_dir EMPTY", "--output_dir '': names no folder"),
    ("grpo.py --output_dir runs/occupied", "runs/occupied/curves.png: is no file"),
    # what others have written
    ("grpo.py --output_dir whole", "--output_dir whole: holds chat_template.jinja, but no run"),
    ("em.py --output_dir .", "but no run"),
    ("opo.py --output_dir runs/interrupted", "script 'opo.py': the run in runs/interrupted has 'bupo.py'"),
    ("grpo.py --model whole --output_dir model", "script 'grpo.py': the run in model has 'sft.py'"),
    ("bupo.py --output_dir runs/begun --seed 1", "--seed 1: the run in"),  # killed before its first checkpoint
    ("opo.py --output_dir runs/begun", "script 'opo.py'"),
    ("bupo.py --output_dir runs/garbled", "holds completions.jsonl, but no run"),
    (
        "grpo.py --model runs/interrupted/checkpoint-1 --output_dir runs/interrupted --overwrite true",
        "--overwrite empties",
    ),
    ("sft.py --data runs/garbled/completions.jsonl --output_dir runs/garbled --overwrite", "--overwrite empties"),
    ("grpo.py --output_dir model", "--output_dir model: is --model too"),  # it would overwrite what it starts from
    ("bupo.py --output_dir runs/interrupted --learning_rate 5e-4", "--learning_rate 0.0005: the run in"),
    ("bupo.py --output_dir runs/interrupted --seed 1", "--seed 1: the run in"),
    ("bupo.py --output_dir runs/interrupted --num_prompts 4", "--num_prompts 4: the run in"),
    ("bupo.py --output_dir runs/interrupted --internal_steps 2", "--internal_steps 2: the run in"),
    ("bupo.py --output_dir runs/interrupted --temperature 0.9", "--temperature 0.9: the run in"),
    ("bupo.py --output_dir runs/damaged_optimizer.pt", "checkpoint-1/optimizer.pt: cannot be read"),
    ("bupo.py --output_dir runs/damaged_trainer_state.json", "checkpoint-1/trainer_state.json: cannot be read"),
    ("bupo.py --output_dir runs/damaged_model.safetensors", "checkpoint-1: this checkpoint is damaged"),
    ("bupo.py --output_dir runs/step_text", "checkpoint-1/trainer_state.json: its step 'one' is no number"),
    ("bupo.py --output_dir runs/step_float", "its step 1.5 is no number"),
    ("bupo.py --output_dir runs/step_null", "its step None is no number"),
    ("grpo.py --output_dir runs/foreign", "checkpoint-500: not a whole checkpoint; --overwrite deletes it"),
]

# Whole commands, and what the line must hold.
WHOLE = [
    ("sft.py --behaviours verify", "--behaviours verify"),
    ("sft.py --behaviours", "--behaviours"),
    ("sft.py --empty --filler", "--empty, --filler"),
    ("sft.py --trajectories_per_problem -1", "--trajectories_per_problem"),
    ("sft.py --problems -1", "--problems"),
    # What lies there would be taken for the embedded model from then on.
    ("sft.py --behaviours verification", "--output_dir runs/tiny"),
    ("sft.py --data countdown-small", "--output_dir runs/tiny"),
    ("sft.py --direct", "--output_dir runs/tiny"),
    ("sft.py --data trajectories.jsonl --output_dir x", "trajectories.jsonl: is for a trained model"),
    # models to be compared
    ("evaluate.py", "models"),
    ("evaluate.py model --ks 1 64", "--ks 64: with 32 samples k is 1 to 32"),
    ("evaluate.py model --ks 8 --num_samples 4", "--ks 8: with 4 samples"),
    ("evaluate.py model --ks 0 --num_samples 4", "--ks 0: with 4 samples"),
    ("evaluate.py model --num_samples 0", "--num_samples 0"),
    ("evaluate.py model --temperatures 1 -0.5", "--temperatures"),
    ("evaluate.py model --temperatures nan", "--temperatures"),
    ("evaluate.py model --rescore", "without --rescore first"),
    ("evaluate.py model --rescore --overwrite", "choose one"),
    ("evaluate.py model --sample 3", "--sample"),
    ("evaluate.py model --chat_template_kwargs no", "--chat_template_kwargs"),
    ("evaluate.py model --max_completion_length 0", "--max_completion_length 0"),
    ("evaluate.py model --data gone.jsonl", "gone.jsonl"),
    ("evaluate.py model model", "listed twice"),
    ("evaluate.py whole", "--data: needed"),
    ("evaluate.py runs/none", "runs/none: no such folder"),
    ("evaluate.py none/of/these", "none/of/these: no such folder"),
    ("evaluate.py ./none", "./none: no such folder"),
    ("evaluate.py runs/interrupted", "runs/interrupted: unfinished, no trainer_state.json"),
    ("evaluate.py runs/killed/checkpoint-1.tmp", "unfinished"),
    ("evaluate.py model --num_samples 1000000000", "--num_samples 1000000000: must be at most"),
    ("evaluate.py model --temperatures 1e-300", "--temperatures 1e-300: must be 0, or at least 0.01"),
    ("evaluate.py model --data arithmetic --num_problems 1000000", "61,431 problems"),
    ("evaluate.py model --sample 3", "did you mean --num_samples?"),
    ("evaluate.py model --output_dir file", "--output_dir file: file is no folder"),
    ("evaluate.py model --output_dir /dev/null", "/dev/null is no folder"),
    ("evaluate.py model --output_dir dangling", "dangling is no folder"),
    ("evaluate.py model --output_dir=", "--output_dir '': names no folder"),
    ("evaluate.py model --output_dir folders/results.json", "folders/results.json/results.json: is no file"),
    ("evaluate.py model --output_dir folders/results.md", "folders/results.md/results.md: is no file"),
    ("evaluate.py model --output_dir folders/pass_at_k.png", "pass_at_k.png/pass_at_k.png: is no file"),
    ("evaluate.py model --output_dir file/below", "file is no folder"),
    ("evaluate.py model --output_dir folders/temperatures.png", "temperatures.png/temperatures.png: is no file"),
    ("evaluate.py model --output_dir folders/training_curves.png", "training_curves.png: is no file"),
    ("evaluate.py model --output_dir folders/samples", "folders/samples/samples is no folder"),
    ("evaluate.py model --output_dir folders/kept", "samples/model--arithmetic--T1.jsonl: is no file"),
    ("evaluate.py model --output_dir folders/kept --overwrite", "samples/model--arithmetic--T1.jsonl: is no file"),
    ("evaluate.py model --rescore --output_dir folders/kept", "samples/model--arithmetic--T1.jsonl: is no file"),
    ("evaluate.py model --grade_timeout 0", "--grade_timeout 0.0: must be at least 0.01"),
    ("evaluate.py model --max_grader_errors 0", "--max_grader_errors 0.0: must be above 0"),
    ("evaluate.py runs/args_list", "runs/args_list/args.json: cannot be read"),
    ("evaluate.py runs/args_text", "runs/args_text/args.json: cannot be read"),
    ("report.py", "runs"),
    ("report.py missing", "missing: no run folder"),
    ("report.py runs/args_text", "runs/args_text/args.json: cannot be read"),
    ("report.py model --maps many", "--maps"),
    ("evaluate.py runs/args_short", "runs/args_short/args.json: has no model"),
    ("analyze_logits.py", "evaluation"),
    ("analyze_logits.py empty", "empty/results.json: no such file; pass the --output_dir of evaluate.py"),
    ("analyze_logits.py empty --probe_problems 0", "--probe_problems 0"),
    ("analyze_gradients.py empty", "empty/results.json: no such file; pass the --output_dir of evaluate.py"),
    ("analyze_gradients.py empty --micro_batch_tokens 0", "--micro_batch_tokens"),
    ("analyze_gradients.py empty --max_grader_errors 0", "--max_grader_errors"),
    ("analyze_logits.py file", "file is no folder"),
    ("analyze_logits.py /dev/null", "/dev/null is no folder"),
    ("analyze_logits.py dangling", "dangling is no folder"),
    ("analyze_logits.py folders/logits.json", "logits.json/logits.json: is no file"),
    ("analyze_gradients.py file/below", "file is no folder"),
    ("analyze_gradients.py folders/gradient_variance.png", "gradient_variance.png: is no file"),
    # answers to be looked into
    ("analyze_entropy.py no/such/folder --data arithmetic", "no/such/folder"),
    ("analyze_entropy.py model no_data_for_this_one", "--data"),
    ("analyze_entropy.py gpt2 --data arithmetic", "GPT2LMHeadModel"),
    ("analyze_entropy.py model --data missing.jsonl", "missing.jsonl"),
    ("analyze_entropy.py model --completions missing.jsonl", "missing.jsonl"),
    ("analyze_entropy.py model --completions empty.jsonl", "holds no completion"),
    ("analyze_entropy.py model --data arithmetic --completions answers.jsonl", "not allowed with"),
    ("analyze_entropy.py model --num_samples 0", "--num_samples"),
    ("analyze_entropy.py model --num_samples 2 --max_completion_length 2 --answer 2", "--answer"),
    ("analyze_entropy.py model --temperature 0", "--temperature"),
    ("analyze_entropy.py model --micro_batch_tokens 0", "--micro_batch_tokens"),
    ("analyze_entropy.py model --nonsense", "--nonsense"),
    ("analyze_entropy.py model --output_dir file", "--output_dir"),
    ("analyze_entropy.py model --output_dir dangling", "dangling is no folder"),
    ("analyze_entropy.py model --output_dir folders/entropy.json", "entropy.json/entropy.json: is no file"),
    ("analyze_entropy.py model --output_dir folders/1_flow.png", "1_flow.png/1_flow.png: is no file"),
    ("analyze_entropy.py model --output_dir folders/3_answer_model.png", "3_answer_model.png: is no file"),
    ("analyze_entropy.py model --output_dir file/below", "file is no folder"),
    ("analyze_entropy.py model --output_dir /dev/null", "/dev/null is no folder"),
    ("analyze_entropy.py model --output_dir=", "--output_dir '': names no folder"),
    ("analyze_lens.py model --max_steps 0", "--max_steps 0: must be 1 or more"),
    ("analyze_lens.py model --batch_answers 0", "--batch_answers 0: must be 1 or more"),
    ("analyze_lens.py model --learning_rate 2", "--learning_rate 2.0: must be above 0"),
    ("analyze_lens.py gone/model --data arithmetic", "--model gone/model: cannot be loaded"),
    ("analyze_lens.py Qwen/Qwen3-4B", "--data: needed"),
    ("analyze_lens.py model --output_dir folders/lens.json", "lens.json/lens.json: is no file"),
    ("analyze_patching.py model --num_cases 0", "--num_cases 0: must be 1 or more"),
    ("analyze_patching.py model --maps -1", "--maps -1: must be 0 or more"),
    ("analyze_patching.py model --blocks one", "--blocks: invalid int value: 'one'"),
    ("analyze_patching.py gone/model --data arithmetic", "--model gone/model: cannot be loaded"),
    ("analyze_patching.py Qwen/Qwen3-4B", "--data: needed"),
    ("analyze_patching.py model --output_dir folders/patching.json", "patching.json/patching.json: is no file"),
    ("analyze_alignment.py model --num_samples 0", "--num_samples 0: must be 1 or more"),
    ("analyze_alignment.py model --internal_layer -1", "--internal_layer -1: must be 0 or more"),
    ("analyze_alignment.py gone/model --data arithmetic", "--model gone/model: cannot be loaded"),
    ("analyze_alignment.py Qwen/Qwen3-4B", "--data: needed"),
    ("analyze_alignment.py model --output_dir folders/alignment.json", "alignment.json/alignment.json: is no file"),
    ("analyze_trajectory.py", "arguments are required"),
    ("analyze_trajectory.py descend embedded", "descend"),
    ("analyze_trajectory.py descent no/such/folder --data arithmetic", "no/such/folder"),
    ("analyze_trajectory.py descent some/model", "--data"),
    ("analyze_trajectory.py descent model --data missing.jsonl", "missing.jsonl"),
    ("analyze_trajectory.py descent model --completions missing.jsonl", "missing.jsonl"),
    ("analyze_trajectory.py descent model --completions empty.jsonl", "holds no completion"),
    ("analyze_trajectory.py descent model --data arithmetic --completions answers.jsonl", "not allowed with"),
    ("analyze_trajectory.py descent model --num_samples 0", "--num_samples"),
    ("analyze_trajectory.py descent model --layers -1", "--layers"),
    ("analyze_trajectory.py descent model --cue boxed", "--cue"),
    ("analyze_trajectory.py descent model --nonsense", "--nonsense"),
    ("analyze_trajectory.py descent model --temperature 0", "--temperature"),
    ("analyze_trajectory.py descent model --completions answers.jsonl --answer 2", "--answer"),
    ("analyze_trajectory.py descent model --completions bare.jsonl", "no trajectory has any thinking"),
    ("analyze_trajectory.py landscape model --points 1", "--points"),
    ("analyze_trajectory.py landscape model --span nan", "--span"),
    ("analyze_trajectory.py landscape model --points 1000000000", "--points 1000000000: must be at most"),
    ("analyze_trajectory.py landscape model --completions bare.jsonl", "no trajectory is right"),
    ("analyze_trajectory.py prune model --percent 101", "--percent"),
    ("analyze_trajectory.py prune model --summary notes", "--summary"),
    ("analyze_trajectory.py prune model --completions answers.jsonl --summary gist", "answers.jsonl:1: no gist"),
    ("analyze_trajectory.py behaviours", "required"),
    ("analyze_trajectory.py behaviours nowhere", "nowhere/completions.jsonl"),
    ("analyze_trajectory.py behaviours runs/silent", "holds no answer"),
    ("analyze_trajectory.py behaviours runs/garbled", "garbled/completions.jsonl:2"),
    ("analyze_trajectory.py behaviours runs/silent --every 0", "--every"),
    ("analyze_trajectory.py behaviours runs/silent --output_dir file", "--output_dir"),
    ("analyze_trajectory.py behaviours runs/step_1.5", "step_1.5/completions.jsonl:1: not an answer of a run"),
    ("analyze_trajectory.py behaviours runs/step_huge", "step_huge/completions.jsonl:1: not an answer of a run"),
    ("analyze_trajectory.py behaviours runs/reward_text", "reward_text/completions.jsonl:1: not an answer of a run"),
    ("analyze_trajectory.py descent model --output_dir folders/descent.json", "descent.json/descent.json: is no file"),
    ("analyze_trajectory.py prune model --output_dir folders/prune.png", "prune.png/prune.png: is no file"),
    ("analyze_trajectory.py landscape model --output_dir /dev/null", "/dev/null is no folder"),
    ("analyze_trajectory.py descent model --output_dir folders/layers.png", "layers.png/layers.png: is no file"),
    ("analyze_trajectory.py descent model --output_dir file/below", "file is no folder"),
    ("analyze_trajectory.py descent model --output_dir dangling", "dangling is no folder"),
    ("analyze_trajectory.py descent model --output_dir=", "--output_dir '': names no folder"),
    ("analyze_trajectory.py landscape model --output_dir folders/landscape.json", "landscape.json: is no file"),
    ("analyze_trajectory.py behaviours runs/garbled --output_dir folders/behaviours.png", "behaviours.png: is no file"),
    ("analyze_trajectory.py descent model --grade_timeout 0", "--grade_timeout"),
    ("analyze_trajectory.py prune model --max_grader_errors 0", "--max_grader_errors"),
    ("analyze_trajectory.py behaviours runs/step_is_str", "completions.jsonl:2: not an answer of a run"),
    ("analyze_trajectory.py behaviours runs/step_is_NoneType", "completions.jsonl:2: not an answer of a run"),
    ("analyze_trajectory.py behaviours runs/reward_is_list", "completions.jsonl:2: not an answer of a run"),
    ("analyze_trajectory.py behaviours runs/reward_is_NoneType", "completions.jsonl:2: not an answer of a run"),
    ("analyze_trajectory.py behaviours runs/text_is_int", "completions.jsonl:2: not an answer of a run"),
    ("analyze_trajectory.py behaviours runs/length_is_str", "completions.jsonl:2: not an answer of a run"),
    ("analyze_trajectory.py behaviours runs/deep", "deep/completions.jsonl:1: not an answer of a run"),
    ("analyze_trajectory.py landscape model --completions answers.jsonl --points 3 --span 1e30", "--span 1e+30"),
]

NAMES = {"LONG": "long" * 80, "DEEP": "long/" * 999, "EMPTY": ""}  # two that are too long for any disk


def good_options(script):
    """The command line of a training script's short run that would go well."""
    fields = importlib.import_module(script.removesuffix(".py")).Args.__dataclass_fields__
    data = "trajectories.jsonl" if script == "sft.py" else "problems.jsonl"
    options = SMALL | dict(model="model", data=data, eval_data="problems.jsonl", output_dir="run")
    return command_line(**{name: value for name, value in options.items() if name in fields})


def error_of(script, options, monkeypatch, capfd):
    """Run a script that must end with exit status 2 and one line on stderr -> that line."""
    monkeypatch.setattr(sys, "argv", [script, *options])
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    lines = capfd.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize("command, expected", BESIDE_GOOD_OPTIONS, ids=[row[0] for row in BESIDE_GOOD_OPTIONS])
def test_a_mistake_in_training_ends_with_one_line(command, expected, here, monkeypatch, capfd):
    """A traceback, or an hour before it, for a mistake that one line could have named; and no folder left behind."""
    script, *options = [NAMES.get(word, word) for word in command.split()]
    before = snapshot()
    assert expected in error_of(script, [*good_options(script), *options], monkeypatch, capfd)
    assert snapshot() == before


@pytest.mark.parametrize("command, expected", WHOLE, ids=[row[0] for row in WHOLE])
def test_a_mistake_in_a_command_ends_with_one_line(command, expected, here, monkeypatch, capfd):
    """The same for the other scripts. These make their output folder first, so that it is known to be writable."""
    script, *options = command.split()
    before = snapshot()
    assert expected in error_of(script, options, monkeypatch, capfd)
    after = snapshot()
    assert {folder: files for folder, files in after.items() if files or folder in before} == before


def test_a_bug_keeps_its_traceback():
    """Only user errors become one line; a bug reported as 'error: 3' could never be found."""
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError(3)


# ---------------------------------------------------------------------------------------------------------------------
# Lines of data files
# ---------------------------------------------------------------------------------------------------------------------


def look_inside(path):
    analyze_entropy.main(analyze_entropy.parse(["model", "--completions", path]))


def descend(path):
    analyze_trajectory.main(analyze_trajectory.parse(["descent", "model", "--completions", path]))


READERS = {
    "problems": tasks.load_problems,
    "trajectories": sft.load_trajectories,
    "entropy": look_inside,
    "descent": descend,
}
GOOD = b'{"problem": "1+1=", "answer": "2", "response": "2", "text": "2", "gold": "2"}\n'  # for every reader
NO_OBJECT = "not a JSON object"

# Who reads it, a wrong line, and what the message must hold.
ANSWERED_CHAT = b'{"prompt": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "3"}], %s}'

LINES = [
    ("problems", b'{"problem": "1+2?"', NO_OBJECT),
    ("problems", b"1+2=3", NO_OBJECT),
    ("problems", b'["1+2?", "3"]', NO_OBJECT),
    ("problems", b'{"problem": "1+2\xff?", "answer": "3"}', NO_OBJECT),
    ("problems", b"[" * 100_000, NO_OBJECT),
    ("problems", b'{"text": "1+2?", "label": "3"}', "found fields text, label"),
    ("problems", b'{"problem": "1+2?"}', "no gold answer"),
    ("problems", b'{"problem": "1+2?", "label": "3"}', "found fields problem, label"),
    ("problems", b'{"problem": " ", "answer": "3"}', "found fields problem, answer"),
    ("problems", b'{"prompt": [], "answer": "3"}', "found fields prompt, answer"),
    ("problems", b'{"prompt": [{"role": "user"}], "answer": "3"}', "found fields prompt, answer"),
    ("problems", b'{"prompt": [{"role": "user", "content": ["1+2?"]}], "answer": "3"}', "found fields prompt, answer"),
    ("problems", b'{"problem": 12, "answer": "3"}', "found fields problem, answer"),
    ("problems", b'{"problem": "1+2?", "answer": ["3"]}', "found fields problem, answer"),
    ("problems", b'{"problem": "1+2?", "answer": true}', "found fields problem, answer"),
    ("problems", b'{"problem": "1+2?", "answer": " "}', "found fields problem, answer"),
    ("problems", b'{"problem": "1+2?", "solution": "three"}', "found fields problem, solution"),
    ("problems", b'{"problem": "1+2?", "answer": NaN}', "found fields problem, answer"),
    ("problems", b'{"problem": "1+2?", "answer": -Infinity}', "found fields problem, answer"),
    ("problems", b'{"problem": "1+2?", "answer": 1e999}', "found fields problem, answer"),
    ("problems", b"{}", "found fields none"),
    ("problems", b'{"problem": "\\ud800", "answer": "3"}', NO_OBJECT),  # half a character: no tokenizer takes it
    ("trajectories", b'{"prompt": "1?", "response": "\\udfff"}', NO_OBJECT),
    # The chat template would ask the model to answer its own answer.
    ("problems", ANSWERED_CHAT % b'"answer": "3"', "end with the assistant's answer"),
    ("trajectories", ANSWERED_CHAT % b'"response": "3"', "end with the assistant's answer"),
    # A conversation without an answer has nothing to imitate; training on the question instead goes unnoticed.
    ("trajectories", b'{"prompt": "1?"}', "found fields prompt"),
    ("trajectories", b'{"response": "3"}', "found fields response"),
    ("trajectories", b'{"messages": [{"role": "user", "content": "What is 1+2?"}]}', "found fields messages"),
    ("trajectories", b'{"prompt": "1?", "response": 3}', "found fields prompt, response"),
    ("trajectories", b'{"text": "1+2=3"}', "found fields text"),
    ("entropy", b"not json", NO_OBJECT),
    ("entropy", b'{"problem": "1+1="}', "no completion"),
    ("entropy", b'{"problem": "1+1=", "text": 2}', "no completion"),
    ("entropy", b'{"problem": "1+1=", "text": "", "finished": false}', "no completion"),
    ("entropy", b'{"text": "2"}', "no problem"),
    ("entropy", b'{"problem": "", "text": "2"}', "no problem"),
    ("descent", b"not json", NO_OBJECT),
    ("descent", b'{"problem": "1+1=", "gold": "2"}', "no text"),
    ("descent", b'{"problem": "1+1=", "text": "2"}', "no gold"),
    ("descent", b'{"problem": "1+1=", "text": "2", "gold": ""}', "no gold"),
    ("descent", b'{"text": "2", "gold": "2"}', "no problem"),
]


def test_a_line_without_end_is_named(here, monkeypatch):
    """A file of one line of hundreds of megabytes was read, copied and tokenized as one problem."""
    monkeypatch.setattr(data_files, "LONGEST_LINE", 1000)
    write_jsonl(Path("data.jsonl"), [{"problem": "1+2?", "answer": "3"}, {"problem": "1" * 2000, "answer": "3"}])
    with pytest.raises(UserError, match="data.jsonl:2: a line of more than 1000 bytes"):
        tasks.load_problems("data.jsonl")


@pytest.mark.parametrize("reader, line, words", LINES, ids=lambda value: ascii(value[:40]))
def test_a_wrong_line_is_named(reader, line, words, here):
    """'KeyError: problem' in line 40,000 of a file helps nobody: say which file and line, and what is there."""
    Path("data.jsonl").write_bytes(GOOD + b"\n" + GOOD + line + b"\n" + GOOD)
    with pytest.raises(UserError) as error:
        READERS[reader]("data.jsonl")
    assert "data.jsonl:4:" in str(error.value)  # blank lines count
    assert words in str(error.value)


@pytest.mark.parametrize(
    "array, words",
    [
        (b'[{"problem": "1+2?", "answer": "3"}, 7]', "data.json:1: not a JSON object"),
        (b'[{"problem": "1+2?", "answer": "3"}, {"problem": "\\ud800"}]', "data.json:1: not a JSON object"),
        (b'[{"problem": "1+2?", "answer": "3"}, {"text": "1"}]', "data.json:1: no problem"),
        (b'[{"problem": "1+2?", "answer": "3"},', "data.json: not a JSON array"),
        (b'["\xff"]', "data.json: not a JSON array"),
        (b" []", "data.json: holds no problem"),
    ],
)
def test_a_wrong_row_of_an_array_is_named(array, words, here):
    Path("data.json").write_bytes(array)
    with pytest.raises(UserError, match=words):
        tasks.load_problems("data.json")


def test_a_byte_order_mark_is_named_or_read():
    """An editor's invisible mark before the first { must not end in a traceback."""
    Path("data.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    try:
        assert tasks.load_problems("data.jsonl")[0].answer == "2"
    except UserError as error:
        assert "data.jsonl:1:" in str(error)


WHOLE_FILE = [
    {"problem": "1+2?", "answer": "3"},
    {"question": "é?", "final_answer": 4},
    {"prompt": "x", "solution": "\\boxed{5}"},
] * 2
VALUES = [None, [], {}, "", True, 1e999, -0.0, 10**30, [{"role": "user", "content": "?"}], [[]], {"role": 1}, "\ud800"]
FOREIGN = [b"\n", b"\r", b"\0", b"[" * 3000, b'"', b"{", b"}", b"\\", b"\xff\xfe"]


def damage(text, generator):
    """An accident to the bytes of a data file: lost, random or foreign bytes, or a row with values of any type."""
    place = generator.randrange(len(text))
    accident = generator.choice(["lost", "random", "foreign", "field", "row"])
    if accident == "lost":
        del text[place : place + generator.randint(1, 30)]
    elif accident == "random":
        text[place:place] = generator.randbytes(generator.randint(1, 4))
    elif accident == "foreign":
        text[place:place] = generator.choice(FOREIGN)
    else:
        row = {"problem": generator.choice(VALUES), "answer": generator.choice(VALUES)}
        if accident == "field":
            row = {generator.choice(["problem", "answer", "x"]): generator.choice(VALUES)}
        text += json.dumps(row).encode() + b"\n"


@pytest.mark.parametrize("n", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_fuzzed_files_are_read_or_named(n, tokenizer):
    """Every file on earth ends up as somebody's --data: it is read, or one line names it; nothing else may happen."""
    generator = random.Random(n)
    read = 0
    for _ in range(n):
        text = bytearray(write_jsonl(Path("data.jsonl"), WHOLE_FILE).read_bytes())
        for _ in range(generator.randint(0, 2)):
            damage(text, generator)
        Path("data.jsonl").write_bytes(text)
        try:
            problems = tasks.load_problems("data.jsonl", system_prompt=generator.choice(["", "Think."]))
            read += len(tokenize_problems(tokenizer, problems, 1000)) > 0
        except UserError as error:
            assert "data.jsonl" in str(error)
    assert 0.05 * n < read < 0.95 * n  # both happen
