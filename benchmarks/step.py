"""Seconds of a training step: grpo.py against TRL's GRPOTrainer, on the CPU, two threads each, taking turns.

Same weights, prompts, 16 x 16 samples, temperature 1, exact on-policy, fp32, AdamW and seeded rewards, half of
each group right. Models with random weights: the embedded one, whose completions all run to their limit; the same with
5 of its 103 tokens ending a completion; and one of 30 M parameters, where 1,000 of 32,000 do. So the lengths are
skewed, and equal on both sides up to chance: the means are printed. Medians of 5 steps after one to warm up; grpo.main
itself runs, TRL in a process of its own between its steps. Then grpo.py alone, with every second group's rewards equal:
those are skipped.

TRL is no requirement; it gets its own environment. Half an hour in all.

    python -m venv trl_env && trl_env/bin/pip install torch trl transformers
    python benchmarks/step.py --trl_python trl_env/bin/python
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

P, G = 16, 16


def rewards(degenerate=False):
    """P * G rewards, prompt-major: half of each group right, in seeded order; degenerate: none in every second."""
    found = []
    for p in range(P):
        group = random.Random(p).sample([0.0, 1.0] * (G // 2), G)
        if degenerate and p % 2:
            group = [0.0] * G
        found.extend(group)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# TRL's side: runs under --trl_python, which need not have what this repository requires, and imports nothing of it
# ---------------------------------------------------------------------------------------------------------------------


def trl_worker(folder, prompts, max_completion_length, rows):
    """One GRPOTrainer step for every line on stdin; answers with one line: seconds, mean and longest completion."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(2)
    lengths = []

    def reward_function(completion_ids, **_):
        lengths[:] = map(len, completion_ids)
        return rewards()

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if not sys.stdin.readline():
                sys.exit()  # the other side is gone
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            print("step", time.perf_counter() - self.start, statistics.mean(lengths), max(lengths), flush=True)

    config = GRPOConfig(
        output_dir=f"{folder}/trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=P * G // rows,
        num_generations=G,
        max_completion_length=max_completion_length,
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-6,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        max_steps=1000,  # until it is ended
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=reward_function,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]),
        callbacks=[Turns()],
    )
    trainer.train()


class Trl:
    """The worker process, as a function: runs one step -> (seconds, mean length, longest)."""

    def __init__(self, python, *arguments):
        command = [python, __file__, "--worker", json.dumps(arguments)]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=self.log, text=True)

    def __call__(self):
        with contextlib.suppress(BrokenPipeError):
            print("go", file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("step "):
                return tuple(map(float, line.split()[1:]))
        self.log.seek(0)
        sys.exit(f"error: TRL's process ended: {self.log.read().strip().splitlines()[-1:]}")

    def end(self):
        self.process.kill()
        self.process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# This repository's side
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """A model, how many of its tokens end a completion, and how both sides run it."""

    model: object
    end_tokens: int
    max_completion_length: int
    micro_batch_tokens: int
    trl_rows: int = 32  # of TRL's micro-batches: about as many tokens as ours
    folder: Path | None = None


def build_models(folder):
    """Settings by name; each model is saved in a folder below `folder`."""
    from transformers import AutoModelForCausalLM

    import sft
    from benchmarks.models import qwen3, random_model

    sft.build_embedded(folder / "embedded")
    embedded = AutoModelForCausalLM.from_pretrained(folder / "embedded")
    larger = random_model(qwen3(384, 1152, 10, 6, 3, V=32000, head_dim=64))
    settings = {
        "embedded, equal lengths": Setting(embedded, 0, max_completion_length=32, micro_batch_tokens=2048),
        "embedded, skewed lengths": Setting(embedded, 5, max_completion_length=64, micro_batch_tokens=2048),
        "30 M, skewed lengths": Setting(larger, 1000, max_completion_length=128, micro_batch_tokens=4096),
    }
    # The tokenizer's own end token is one that no model can give; random weights give all others alike.
    tokenizer = sft.embedded_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|never sampled|>"})
    for name, setting in settings.items():
        V = setting.model.config.vocab_size
        setting.model.generation_config.eos_token_id = list(range(V - setting.end_tokens, V)) or None
        setting.folder = folder / name
        setting.model.save_pretrained(setting.folder)
        tokenizer.save_pretrained(setting.folder)
    return settings


def grpo_args(setting, prompts, steps):
    """grpo.Args for a run on these prompts in the model's folder."""
    import grpo

    data = setting.folder / "prompts.jsonl"
    rows = [json.dumps({"problem": prompt, "answer": "0"}) for prompt in prompts]
    data.write_text("\n".join(rows) + "\n")
    options = dict(
        model=str(setting.folder),
        data=str(data),
        output_dir=str(setting.folder / "run"),
        num_prompts=P,
        num_generations=G,
        max_steps=steps,
        max_completion_length=setting.max_completion_length,
        micro_batch_tokens=setting.micro_batch_tokens,
        learning_rate=1e-6,
        save_steps=0,
        eval_steps=0,
        overwrite=True,
    )
    return grpo.Args(**grpo.EMBEDDED | options)


def run_grpo(args, scores, between=lambda: None):
    """Seconds of every step of grpo.main, and its log; `between` runs before each."""
    import bookkeeping
    import common
    import grpo
    from plumbing import figures
    from plumbing.files import read_log

    times = []
    real_steps = bookkeeping.Run.steps

    def steps_in_turns(run):
        for given in real_steps(run):
            between()
            run.lap("waiting")
            start = time.perf_counter()
            yield given
            times.append(time.perf_counter() - start)

    def judge(*_):
        return ["right" if score else "wrong" for score in scores]

    with (
        mock.patch.object(bookkeeping.Run, "steps", steps_in_turns),
        mock.patch.object(common, "judge", judge),
        mock.patch.object(figures, "draw_curves"),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        grpo.main(args)
    log = read_log(Path(args.output_dir) / "metrics.jsonl")
    assert all(record["optimizer_steps"] for record in log), "a step that trained nothing was timed"
    return times, log


def compare(name, setting, trl_python, steps):
    import tasks

    prompts = [problem.prompt for problem in tasks.load_problems("arithmetic", "train", P)]
    args = grpo_args(setting, prompts, steps + 1)
    trl = Trl(trl_python, str(setting.folder), prompts, setting.max_completion_length, setting.trl_rows)
    answers = []  # of TRL's side
    ours, log = run_grpo(args, rewards(), between=lambda: answers.append(trl()))
    trl.end()
    skipping, _ = run_grpo(args, rewards(degenerate=True))

    log = log[1:]
    theirs, their_lengths, longest = zip(*answers[1:])
    their_time = statistics.median(theirs)
    our_time = statistics.median(ours[1:])
    skipping_time = statistics.median(skipping[1:])
    our_length = statistics.mean(record["response_length"] for record in log)
    their_length = statistics.mean(their_lengths)
    stages = []
    for stage in log[-1]["seconds_by_stage"]:
        if stage != "waiting":
            median = statistics.median(record["seconds_by_stage"][stage] for record in log)
            stages.append(f"{stage} {median:.2f} s")
    ratio = their_time / our_time
    print(f"{name}: TRL {their_time:.2f} s, grpo.py {our_time:.2f} s per step, ratio {ratio:.2f} (aim 2 to 3)")
    print(f"  mean completion: TRL {their_length:.1f}, grpo.py {our_length:.1f} tokens; longest {longest[-1]:.0f}")
    print("  stages of grpo.py: " + ", ".join(stages))
    faster = our_time / skipping_time
    print(f"  every second group of equal rewards: {skipping_time:.2f} s, {faster:.2f} x faster", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl_python", default="", help="the python of an environment that has TRL")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--only", default="", help="models whose names hold this: embedded, equal, skewed, '30 M'")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        trl_worker(*json.loads(args.worker))
        return
    if not shutil.which(args.trl_python):
        remedy = "python -m venv E && E/bin/pip install torch trl transformers, then --trl_python E/bin/python"
        print(f"no TRL: {remedy}")
        return
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # imports start at the root of the repository
    import torch

    with tempfile.TemporaryDirectory() as folder:
        settings = build_models(Path(folder))
        torch.set_num_threads(2)
        chosen = [name for name in settings if args.only in name]
        if not chosen:
            names = ", ".join(map(repr, settings))
            sys.exit(f"error: --only {args.only!r}: none of {names}; pass part of one of these")
        for name in chosen:
            compare(name, settings[name], args.trl_python, args.steps)


if __name__ == "__main__":
    main()
