"""Seconds of a training step: grpo.py against TRL's GRPOTrainer, on the CPU, two threads each, taking turns.

Same weights, prompts, 16 x 16 samples, temperature 1, exact on-policy, fp32, AdamW and seeded rewards, half of
each group right. Models with random weights: the embedded one, whose completions all run to their limit; the same with
5 of its 103 tokens ending a completion; and one of 30 M parameters, where 1,000 of 32,000 do. So the lengths are
skewed, and equal on both sides up to chance: the means are printed. Medians of 5 steps after one to warm up; grpo.main
itself runs, TRL in a process of its own between its steps. Then grpo.py alone, with every second group's rewards equal:
those are skipped.

TRL is no requirement; it gets its own environment. Half an hour in all.

    python -m venv trl_env && trl_env/bin/pip install torch trl transformers
    python tests/bench_step.py --trl_python trl_env/bin/python
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
from pathlib import Path

P, G = 16, 16


def rewards(degenerate=False):
    """P * G rewards, prompt-major: half of each group right, in seeded order; degenerate: none in every second."""
    groups = [random.Random(p).sample([0.0, 1.0] * (G // 2), G) for p in range(P)]
    return [reward * (1 - p % 2 * degenerate) for p in range(P) for reward in groups[p]]


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
            print("step", time.perf_counter() - self.start, sum(lengths) / len(lengths), max(lengths), flush=True)

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


# ---------------------------------------------------------------------------------------------------------------------
# This repository's side
# ---------------------------------------------------------------------------------------------------------------------


def build_models(folder):
    """-> {name: (model folder, options of grpo.py, rows of TRL's micro-batches: about as many tokens as ours)}."""
    from bench_memory import qwen3, random_model
    from conftest import TOKENIZER
    from transformers import AutoModelForCausalLM

    import sft

    sft.build_embedded(folder / "embedded")
    embedded = AutoModelForCausalLM.from_pretrained(folder / "embedded")
    larger = random_model(qwen3(384, 1152, 10, 6, 3, V=32000, head_dim=64))
    # The tokenizer's own end token is one that no model can give; random weights give all others alike.
    TOKENIZER.add_special_tokens({"eos_token": "<|never sampled|>"})
    settings = {
        "embedded, equal lengths": (embedded, 0, dict(max_completion_length=32, micro_batch_tokens=2048), 32),
        "embedded, skewed lengths": (embedded, 5, dict(max_completion_length=64, micro_batch_tokens=2048), 32),
        "30 M, skewed lengths": (larger, 1000, dict(max_completion_length=128, micro_batch_tokens=4096), 32),
    }
    for name, (model, end_tokens, *_) in settings.items():
        V = model.config.vocab_size
        model.generation_config.eos_token_id = list(range(V - end_tokens, V)) or None
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    return {name: (folder / name, options, rows) for name, (_, _, options, rows) in settings.items()}


def run_grpo(model_folder, options, prompts, steps, scores, between=lambda: None):
    """Seconds of every step of grpo.main, and its log; `between` runs before each."""
    from unittest import mock

    import bookkeeping
    import common
    import grpo

    times, real_steps = [], bookkeeping.Run.steps

    def steps_in_turns(run):
        for given in real_steps(run):
            between()
            run.lap("waiting")
            start = time.perf_counter()
            yield given
            times.append(time.perf_counter() - start)

    data = model_folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"problem": prompt, "answer": "0"}) + "\n" for prompt in prompts))
    args = grpo.EMBEDDED | dict(model=str(model_folder), data=str(data), output_dir=str(model_folder / "run"))
    args |= dict(num_prompts=P, num_generations=G, max_steps=steps, learning_rate=1e-6)
    args |= dict(save_steps=0, eval_steps=0, overwrite=True)
    with (
        mock.patch.object(bookkeeping.Run, "steps", steps_in_turns),
        mock.patch.object(common, "judge", lambda *_: ["right" if score else "wrong" for score in scores]),
        mock.patch.object(bookkeeping, "draw_curves", lambda folder: None),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        grpo.main(grpo.Args(**args | options))
    log = bookkeeping.read_log(model_folder / "run" / "metrics.jsonl")
    assert all(record["optimizer_steps"] for record in log), "a step that trained nothing was timed"
    return times, log


def compare(name, model_folder, options, rows, trl_python, steps):
    import common

    prompts = [p.prompt for p in common.arithmetic("train", P)]
    trl, theirs = Trl(trl_python, str(model_folder), prompts, options["max_completion_length"], rows), []
    ours, log = run_grpo(model_folder, options, prompts, steps + 1, rewards(), lambda: theirs.append(trl()))
    trl.process.kill()
    trl.process.wait()
    skipping, _ = run_grpo(model_folder, options, prompts, steps + 1, rewards(degenerate=True))
    ours_s, theirs_s, skipping_s = (
        statistics.median(column[1:]) for column in (ours, [t for t, _, _ in theirs], skipping)
    )
    lengths = [(record["response_length"], mean) for record, (_, mean, _) in zip(log[1:], theirs[1:])]
    means = [statistics.mean(column) for column in zip(*lengths)]
    stages = [stage for stage in log[-1]["seconds_by_stage"] if stage != "waiting"]
    medians = [statistics.median(record["seconds_by_stage"][stage] for record in log[1:]) for stage in stages]
    print(f"{name}: TRL {theirs_s:.2f} s, grpo.py {ours_s:.2f} s per step, ratio {theirs_s / ours_s:.2f} (aim 2 to 3)")
    print(f"  mean completion: TRL {means[1]:.1f}, grpo.py {means[0]:.1f} tokens; longest {theirs[-1][2]:.0f}")
    print("  stages of grpo.py: " + ", ".join(f"{stage} {value:.2f} s" for stage, value in zip(stages, medians)))
    print(f"  every second group of equal rewards: {skipping_s:.2f} s, {ours_s / skipping_s:.2f} x faster", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl_python", default="", help="the python of an environment that has TRL")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--only", default="", help="models whose names hold this: embedded, equal, skewed, '30 M'")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return trl_worker(*json.loads(args.worker))
    if not shutil.which(args.trl_python):
        return print(
            "no TRL: python -m venv E && E/bin/pip install torch trl transformers, then --trl_python E/bin/python"
        )
    import torch

    with tempfile.TemporaryDirectory() as folder:
        models = build_models(Path(folder))
        torch.set_num_threads(2)
        chosen = [name for name in models if args.only in name]
        if not chosen:
            sys.exit(f"error: --only {args.only!r}: none of {', '.join(map(repr, models))}; pass part of one of these")
        for name in chosen:
            compare(name, *models[name], args.trl_python, args.steps)


if __name__ == "__main__":
    main()
