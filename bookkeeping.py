"""The run folder: data order, clock, logs, warnings, evaluations, checkpoints, resume, curves.

Nothing here knows what is trained or why: it calls common.py and is called by the scripts. Read it when a run must be
stopped, resumed or trusted; for the algorithms it can be skipped.
"""

import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import common
from common import UserError, mendable

# Options that a resumed run may change, by how their names start; any other change would make it another experiment.
RESUMABLE = ("max_steps", "save_", "eval_", "report_to", "micro_batch_tokens", "overwrite", "output_dir")


# What goes wrong in training without an error: name -> (when, told from a step's metrics; what it means, what to try).
FAULTS = {
    "no signal": (lambda m: m.get("optimizer_steps") == 0 and not m["skipped_steps"],
        "every group's rewards are all equal: nothing was learnt; take easier or harder --data, or prime with sft.py"),
    "all truncated": (lambda m: m.get("truncated_share") == 1,
        "no answer ended; raise --max_completion_length, or check that the chat template writes the model's end token"),
    "log-prob gap": (lambda m: (m.get("logp_gap") or 0) > 0.05,  # nats per token; bf16 rounding gives about 0.01
        "sampler and trainer disagree: what is trained is not what was sampled; try --dtype float32"),
    "entropy collapse": (lambda m: m.get("entropy", 1) < 1e-3,
        "samples hardly differ any more; go back to an earlier checkpoint, or lower --learning_rate"),
    "vanishing updates": (lambda m: m.get("updated_share") is not None and m["updated_share"] < 0.5,
        "most are below the precision of the weights and change nothing; raise --learning_rate"),
    "non-finite gradient": (lambda m: m.get("skipped_steps", 0) > 0,
        "it updated nothing, and ten in a row end the run; lower --learning_rate, or try --dtype float32"),
    "verifier": (lambda m: m.get("grader_timeouts", 0) + m.get("grader_errors", 0) > 0,
        "answers that defeat it score 0: see grader_timeouts, grader_errors; --grade_timeout gives it more time"),
}  # fmt: skip


class Run:
    """One training run in --output_dir: data order, clock, logs, evaluations, checkpoints, resume.

    A script's main: run = Run(args); model, tokenizer, optimizer = run.load(); for step, problems in run.steps():
    train, run.log(...), run.save(step); and run.finish(). Nothing is written before the first step.
    """

    def __init__(self, args):
        self.args, self.folder, self.stop_signal, self.faults = args, Path(args.output_dir), None, {}
        common.verifier.seconds = args.grade_timeout
        if self.folder.is_dir() and Path(args.model).is_dir() and self.folder.samefile(args.model):
            raise UserError(f"--output_dir {self.folder}: is --model too; pass another folder")
        if step_of(self.folder) >= args.max_steps and not args.overwrite:
            sys.exit(print(f"{self.folder}: finished; --overwrite trains again, --output_dir elsewhere"))
        # The newest whole checkpoint, and the step after which it was written; a half-written one has step 0.
        self.checkpoint = max([self.folder, *self.folder.glob("checkpoint-*")], key=step_of)
        self.start = 0 if args.overwrite else step_of(self.checkpoint)
        foreign = [path for path in self.folder.glob("checkpoint-*") if path.suffix != ".tmp"]
        if not self.start and not args.overwrite and foreign:
            raise UserError(f"{foreign[0]}: not a whole checkpoint; --overwrite deletes it, --output_dir avoids it")
        before = read_json(self.folder / "args.json") if self.start else {}
        for name, value in vars(args).items():
            if self.start and str(before.get(name)) != str(value) and not name.startswith(RESUMABLE):
                remedy = "repeat its command to resume it, --overwrite it, or take another --output_dir"
                raise UserError(f"--{name} {value!r}: the run in {self.folder} has {before.get(name)!r}; {remedy}")

    def load(self, problems=None):
        """(model, tokenizer, optimizer) from the newest whole checkpoint, else from --model; training problems (those
        given, else --data) and held-out ones, tokenized."""
        args = self.args
        path = self.checkpoint if self.start else args.model
        self.model, self.tokenizer = common.load_model(str(path), args.device, args.dtype)
        limits = args.max_prompt_length, json.loads(args.chat_template_kwargs)
        problems = problems or common.load_problems(args.data, "train", 0, args.system_prompt)
        self.problems = common.tokenize_problems(self.tokenizer, problems, *limits)
        self.eval_problems, eval_data = [], args.eval_data or (args.data if args.data in common.BUILT_IN else "")
        if eval_data and args.eval_steps:
            problems = common.load_problems(eval_data, "test", args.eval_problems, args.system_prompt)
            self.eval_problems = common.tokenize_problems(self.tokenizer, problems, *limits)
        if args.num_prompts > len(self.problems):
            raise UserError(f"--num_prompts {args.num_prompts}: {args.data} has only {len(self.problems)}; lower it")
        print(f"first prompt: {self.tokenizer.decode(self.problems[0].ids)!r}, tokens {self.problems[0].ids}"[:1000])
        if args.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.optimizer = common.Optimizer(self.model, args)
        if self.start:
            with mendable(f"{path}/optimizer.pt: cannot be read", f"delete {path} to go back"):
                self.optimizer.load_state_dict(torch.load(path / "optimizer.pt", "cpu", weights_only=True))
        return self.model, self.tokenizer, self.optimizer

    def steps(self):
        """Yield (step, problems) from the first, or first not yet trained, step to --max_steps."""
        self.report = reporter(self.args)
        with mendable(f"--output_dir {self.folder}: cannot be written", "pass another folder", OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.start:
                (self.folder / "trainer_state.json").unlink(missing_ok=True)
                for path in (*self.folder.glob("checkpoint-*"), *self.folder.glob("best")):
                    shutil.rmtree(path)
            write_json(self.folder / "args.json", vars(self.args))
            for log in (self.folder / "metrics.jsonl", self.folder / "completions.jsonl"):
                write_text(log, jsonl(read_log(log, self.start) if self.start else []))
        with contextlib.suppress(ValueError):  # outside the main thread signals stay as they are
            signal.signal(signal.SIGINT, self.interrupt)
            signal.signal(signal.SIGTERM, self.interrupt)
        print(f"{self.folder}: resuming after step {self.start}") if self.start else self.evaluate(0)
        self.bar = tqdm(total=self.args.max_steps, initial=self.start, unit="step", mininterval=1.0)
        for step in range(self.start + 1, self.args.max_steps + 1):
            torch.manual_seed(common.step_seed(self.args.seed, step))  # for models with randomness of their own
            self.stages, self.mark = {}, time.perf_counter()
            yield step, self.batch(step)
        self.bar.close()

    def interrupt(self, number, frame):
        """First SIGINT or SIGTERM: let the step finish (`save` then stops the run). Second: stop at once."""
        if self.stop_signal:
            sys.exit(128 + number)
        self.stop_signal = number
        print("\nstopping after this step (once more: at once)", file=sys.stderr)

    def batch(self, step):
        """The problems of a step: consecutive blocks of a permutation that depends on seed and epoch only, so that
        resuming needs no stored position. The few problems left over at the end of an epoch are dropped."""
        P, order = self.args.num_prompts, [*self.problems]
        epoch, block = divmod(step - 1, len(order) // P)
        random.Random(f"{self.args.seed}-{epoch}").shuffle(order)
        return order[block * P : (block + 1) * P]

    def lap(self, stage):
        """Charge the time since this step's last lap to `stage`."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        before, self.mark = self.mark, time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + self.mark - before

    def write(self, record):
        """Append a record to metrics.jsonl and send it to --report_to."""
        append_jsonl(self.folder / "metrics.jsonl", [record])
        self.report(record, step=record["step"])

    def record(self, step, metrics, shown=("loss",)):
        """Log a training step; show some of its metrics on the bar."""
        seconds, memory = sum(self.stages.values()), peak_memory_gb(self.model.device)
        self.write(dict(step=step, **metrics, seconds=seconds, seconds_by_stage=self.stages, peak_memory_gb=memory))
        for name, (happens, remedy) in FAULTS.items():
            if name not in self.faults and happens(metrics):
                self.faults[name] = f"warning: {name} (first in step {step}): {remedy}"
                tqdm.write(self.faults[name], file=sys.stderr)
        self.bar.set_postfix({name: f"{metrics[name]:.3g}" for name in shown}, refresh=False)
        self.bar.update()

    def log(self, step, problems, rollouts, rewards, advantages, metrics):
        """Append a step of reinforcement learning to metrics.jsonl and its answers to completions.jsonl.

        rewards [P, G]; advantages [P, G] or None; metrics: what only the algorithm knows, by name.
        """
        right, lengths, answers = rewards.flatten() == 1, rollouts.lengths.float().cpu(), []
        for i, text in enumerate(rollouts.texts):
            p, g = divmod(i, rewards.shape[1])
            prompt = problems[p].prompt if isinstance(problems[p].prompt, str) else problems[p].prompt[-1]["content"]
            answer = dict(step=step, problem=prompt, text=text, answer=common.last_boxed(text), gold=problems[p].answer)
            answer |= dict(reward=rewards[p, g].item(), length=int(lengths[i]), finished=bool(rollouts.finished[i]))
            answer |= dict(numbers=problems[p].numbers, target=problems[p].target) if problems[p].numbers else {}
            answers.append(answer | dict(advantage=None if advantages is None else advantages[p, g].item()))
        append_jsonl(self.folder / "completions.jsonl", answers)
        names = dict(grader_timeouts="timeout", grader_errors="error", unparsable_golds="unparsable")
        undecided = {name: rollouts.verdicts.count(verdict) for name, verdict in names.items()}
        figures = dict(reward=rewards.mean().item(), **common.summary(rollouts, rewards), **undecided)
        for name, rows in (("length_right", right), ("length_wrong", ~right)):
            figures[name] = lengths[rows].mean().item() if rows.any() else None
        figures["zero_variance_share"] = (rewards.amax(1) == rewards.amin(1)).float().mean().item()
        self.lap("bookkeeping")
        figures["tokens_per_second"] = lengths.sum().item() / sum(self.stages.values())
        self.record(step, figures | metrics, ("reward", "accuracy", "response_length", "entropy"))
        if sum(undecided.values()) > self.args.max_grader_errors * len(answers):
            remedy = "mend the golds of --data, raise --grade_timeout or --max_grader_errors"
            raise UserError(f"step {step}: no verdict on too many of {len(answers)} answers, {undecided}; {remedy}")

    def evaluate(self, step):
        """Where due: sampled and greedy accuracy on held-out problems and the KL to the starting model, into
        metrics.jsonl."""
        args, inputs = self.args, (self.model, self.tokenizer, self.eval_problems)
        if not self.eval_problems or (step % args.eval_steps and step < args.max_steps):
            return
        limits = dict(max_completion_length=args.max_completion_length, max_rollout_tokens=args.max_rollout_tokens)
        seed = common.step_seed(args.seed, "evaluation")  # the same at every step: less noise between evaluations
        sampled = common.evaluate(*inputs, args.eval_samples, args.eval_temperature, seed=seed, **limits)
        greedy, kl = common.evaluate(*inputs, 1, 0.0, **limits)["accuracy"], 0.0
        if step > 0:
            start, _ = common.load_model(args.model, args.device, args.dtype)  # for this pass only: freed on return
            limits = args.micro_batch_tokens, args.eval_temperature
            kl = common.kl_between(self.model, start, sampled["rollouts"], *limits)
        figures = {f"eval_{name}": value for name, value in sampled.items() if isinstance(value, float)}
        record = dict(step=step, **figures, eval_greedy_accuracy=greedy, kl_to_start=kl)
        self.write(record)
        tqdm.write(", ".join(f"{name} {value:.4g}" for name, value in record.items()))

    def save(self, step):
        """End a step: evaluate and checkpoint where due. After a signal: checkpoint, say how to resume, exit."""
        args = self.args
        self.evaluate(step)
        if self.stop_signal or (args.save_steps and step % args.save_steps == 0 and step < args.max_steps):
            self.write_model(self.folder / f"checkpoint-{step}", step)
            whole = sorted((p for p in self.folder.glob("checkpoint-*") if step_of(p)), key=step_of)
            for path in whole[: -args.save_total_limit]:  # 0 keeps them all: whole[:-0] is empty
                shutil.rmtree(path)
        if self.stop_signal:
            self.bar.close()
            sys.stderr.writelines(f"{fault}\n" for fault in self.faults.values())
            print(f"stopped after step {step}; the same command resumes from {self.folder}", file=sys.stderr)
            sys.exit(128 + self.stop_signal)

    def write_model(self, folder, step):
        """A `from_pretrained` folder with tokenizer, optimizer and the step after which it was written: whole or not at
        all, since it gets its name only when everything is on the disk. Raises UserError if the disk is full, say."""
        temporary = folder.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        remedy = "free some space, then repeat the command to go on from the checkpoint before"
        with mendable(f"{folder}: cannot be written", remedy), contextlib.ExitStack() as cleanup:
            cleanup.callback(shutil.rmtree, temporary, ignore_errors=True)  # finds nothing where all went well
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            torch.save(self.optimizer.state_dict(), temporary / "optimizer.pt")
            write_json(temporary / "trainer_state.json", {"step": step})
            for path in (*filter(Path.is_file, temporary.rglob("*")), temporary):
                sync(path)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
        sync(self.folder)

    def finish(self):
        """Model, tokenizer and optimizer into the run folder itself, then the curves."""
        self.write_model(self.folder / "final", max(self.start, self.args.max_steps))
        (self.folder / "trainer_state.json").unlink(missing_ok=True)
        for path in sorted((self.folder / "final").iterdir()):  # trainer_state.json marks a finished run: it moves last
            shutil.rmtree(self.folder / path.name, ignore_errors=True)  # of a folder: some tokenizers' chat templates
            os.replace(path, self.folder / path.name)
        (self.folder / "final").rmdir()
        sync(self.folder)
        draw_curves(self.folder)
        with contextlib.suppress(ValueError):  # only now: a signal must not cut the writing
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.stderr.writelines(f"{fault}\n" for fault in self.faults.values())
        print(f"{self.folder}: model, metrics.jsonl, completions.jsonl, curves.png")


def step_of(folder):
    """The step after which a model folder was written whole; 0 for one that was not ('checkpoint-20.tmp', say)."""
    state = folder / "trainer_state.json"
    return read_json(state).get("step", 0) if state.is_file() and folder.suffix != ".tmp" else 0


def read_json(path):
    """The object in a JSON file of a run folder. Raises UserError."""
    with mendable(f"{path}: cannot be read", "--overwrite trains again, --output_dir elsewhere"):
        return dict(json.loads(path.read_text()).items())


def jsonl(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def append_jsonl(path, records):
    with open(path, "a", encoding="utf-8") as file:
        file.write(jsonl(records))


def read_log(path, step=math.inf):
    """The records of a JSONL log up to a step, as a list; [] without the file. A line cut off by a kill is left out."""
    records = []
    for line in path.read_text("utf-8", "replace").split("\n") if path.is_file() else ():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if record["step"] <= step]


def write_text(path, text):
    """Write a file whole or not at all."""
    path.with_suffix(".tmp").write_text(text, encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def peak_memory_gb(device):
    """Peak memory of this process in 10^9 bytes: of the GPU it trains on, on CPU what was resident."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident) / 1e9


def reporter(args):
    """A function (record, step=...) that logs to --report_to. Raises UserError if that package is not installed."""
    if args.report_to == "none":
        return lambda record, step: None
    with mendable(f"--report_to {args.report_to}: not installed", "pip install it, or take none", ImportError):
        tracker = __import__(args.report_to)
    tracker.init(project=Path.cwd().name, name=args.output_dir, config=vars(args))
    return tracker.log


def draw_curves(folder):
    """curves.png from metrics.jsonl: accuracy, entropy, length and KL against steps; the internal phase is shaded."""
    import matplotlib.pyplot as plt

    records = read_log(folder / "metrics.jsonl")
    internal = max((record["step"] for record in records if record.get("phase") == "internal"), default=0)
    panels = {
        "accuracy": {"accuracy": "0.6", "eval_accuracy": "ko-", "eval_greedy_accuracy": "k^:"},
        "entropy (nats per token)": {"entropy": "0.6", "eval_entropy": "ko-", "trained_entropy": "k--"},
        "response length (tokens)": {"response_length": "0.6", "eval_response_length": "ko-"},
        "KL to the starting model (nats per token)": {"kl_to_start": "ko-"},
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained", sharex=True)
    for axis, (title, styles) in zip(axes.flat, panels.items()):
        for name, style in styles.items():
            points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
            axis.plot([x for x, _ in points], [y for _, y in points], style, label=name, markersize=4)
        axis.axvspan(0, internal, color="tab:orange", alpha=0.2, label="internal policy trained" if internal else None)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.legend(fontsize=8)
    figure.savefig(folder / "curves.png", dpi=100)
    plt.close(figure)
