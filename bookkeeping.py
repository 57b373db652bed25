"""The run folder: data order, clock, logs, warnings, evaluations, checkpoints, resume.

Nothing here knows what is trained or why. Read it when a run must be stopped, resumed or trusted; for the algorithms it
can be skipped. A script's main calls it in this order, and every call does what it is named for and nothing else:

    run = Run(args)                                 looks at --output_dir: a new run, or one to resume?
    run.exit_if_finished()
    model, tokenizer, optimizer = run.load()        and the problems, tokenized
    run.open_folder()                               from here on files are written; a former run's files are deleted
    run.catch_signals()
    for step, problems in run.steps():
        run.lap("sampling")                         after each stage
        run.log_completions(...); run.log(...)
        run.evaluate(step); run.save(step)          where due
        run.exit_if_interrupted(step)
    run.finish()
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import common
import tasks
from plumbing import distributed, figures, processes, sharding, verifier
from plumbing.blocks import rate_factors, train_only
from plumbing.errors import UserError, close_progress_bars, explain
from plumbing.files import (
    append_jsonl,
    check_folder,
    lock_folder,
    read_json,
    read_log,
    sync,
    to_jsonl,
    write_json,
    write_text,
)
from plumbing.models import load_model, tokenize_problems
from plumbing.optimizer import Optimizer
from plumbing.options import EMBEDDED_MODEL
from plumbing.runs import start_of_chain, step_of
from tasks.answers import last_boxed

# Metrics that may differ between two equal runs: clocks and memory, nothing that is learned.
VOLATILE = {"seconds", "seconds_by_stage", "tokens_per_second", "peak_memory_gb"}

# Metrics on the progress bar, of those that a script has, and what stands before them there: it must fit 80 columns.
SHOWN = dict(loss="loss ", accuracy="right ", response_length="length ", entropy="entropy ", phase="")
BAR = "step {n_fmt}/{total_fmt} {bar} {remaining} left{postfix}"

# Options that a resumed run may change, by how their names start; any other change would make it another experiment.
RESUMABLE = ("max_steps", "save_", "eval_", "report_to", "overwrite", "output_dir")

# And those that say what the machine can do: they change rounding and the order of random draws, no more.
MACHINE = (
    "device",
    "optimizer_device",
    "gradient_checkpointing",
    "micro_batch_tokens",
    "max_rollout_tokens",
    "grade_timeout",
    "max_grader_errors",
)

# Signals that ask a run to stop: Ctrl-C, kill, and a terminal that is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Files that a run writes into its folder, beside those of the model.
FILES = ("args.json", "metrics.jsonl", "completions.jsonl", "curves.png", "trainer_state.json", "model.safetensors")


class Run:
    """One training run in --output_dir."""

    def __init__(self, args):
        """Look at the run folder; nothing is written. Raises UserError if it belongs to another run, or is --model, or
        if another process is at work there."""
        distributed.start(args)
        self.args = args
        self.folder = Path(args.output_dir)
        self.stepping = False  # whether a step has begun
        self.order = []  # a permutation of the problems
        self.epoch = None  # the epoch whose permutation that is
        self.shown = ""  # on the progress bar, of the last step
        self.stop_signal = None  # the number of the signal that asked this run to stop
        self.agreed_signal = 0  # the same as `save` has found it, in every process
        self.warnings = {}  # of a fault, the line that was shown
        self.carried = {}  # optimizers whose state goes into every checkpoint, by the names of their files
        check_folder(args.output_dir, FILES)
        self.refuse_own_input()
        if self.folder.is_dir() and not args.overwrite:
            self.refuse_foreign_folder()
        if self.folder.is_dir():
            lock_folder(self.folder)
        self.finished = step_of(self.folder) >= args.max_steps and not args.overwrite
        # The newest whole checkpoint, and the step after which it was written; a half-written one has step 0.
        self.checkpoint = max([self.folder, *self.folder.glob("checkpoint-*")], key=step_of)
        self.start = 0 if args.overwrite else step_of(self.checkpoint)
        self.resumed = self.start > 0
        distributed.refuse_other_folder(args.output_dir, self.start)
        if args.overwrite:
            return
        if (self.folder / "args.json").is_file():
            self.compare_options()
        if not self.resumed:
            self.refuse_damaged_checkpoints()

    def refuse_own_input(self):
        """Raise UserError if this run would write over what it reads: --model is its folder, or a file of --data or a
        model lies in a folder that --overwrite empties."""
        args = self.args
        folder = self.folder.resolve()
        if Path(args.model).is_dir() and Path(args.model).resolve() == folder:
            raise UserError(f"--output_dir {self.folder}: is --model too; pass another folder")
        for name in ("model", "data", "eval_data"):
            value = getattr(args, name)
            path = Path(value).resolve()
            inside = bool(value) and path.exists() and path.is_relative_to(folder) and path.name != "start"
            if inside and args.overwrite:
                remedy = "move it, or pass another --output_dir"
                raise UserError(f"--{name} {value}: lies in --output_dir, which --overwrite empties; {remedy}")

    def refuse_foreign_folder(self):
        """Raise UserError if the folder holds anything, but no run: a new run would write over it."""
        if (self.folder / "args.json").is_file():
            return
        self.refuse_damaged_checkpoints()
        for path in sorted(self.folder.iterdir()):
            if path.name != "start" and not path.name.startswith("."):  # start: the embedded model before its training
                remedy = "pass another folder, or --overwrite to write there all the same"
                raise UserError(f"--output_dir {self.folder}: holds {path.name}, but no run; {remedy}")

    def compare_options(self):
        """Raise UserError if the run in the folder was started by another script or with other options than these. What
        else may have changed with the machine is named on stderr."""
        # An option that is newer than the run is missing in its file: its default does what was done before it came.
        defaults = {field.name: field.default for field in dataclasses.fields(self.args)}
        before = defaults | read_json(self.folder / "args.json")
        now = dict(script=script_of(self.args), **vars(self.args))
        remedy = "repeat its command, --overwrite it, or take another --output_dir"
        for name, value in now.items():
            was = before.get(name)
            if str(was) == str(value) or name.startswith(RESUMABLE):
                continue
            if name not in MACHINE:
                option = "" if name == "script" else "--"
                raise UserError(f"{option}{name} {value!r}: the run in {self.folder} has {was!r}; {remedy}")
            if not self.finished:
                print(f"note: --{name} is {value!r} from here on; it was {was!r}", file=sys.stderr)

    def refuse_damaged_checkpoints(self):
        """Raise UserError if there are checkpoints, but none that is whole: a new run would delete them."""
        for path in self.folder.glob("checkpoint-*"):
            if path.suffix != ".tmp":
                remedy = "--overwrite deletes it, --output_dir avoids it"
                raise UserError(f"{path}: not a whole checkpoint; {remedy}")

    def exit_if_finished(self):
        """End the program, status 0, if the folder holds a run that has taken all of its steps."""
        if self.finished:
            if processes.is_first() and not (self.folder / "curves.png").exists():  # killed while it drew them
                figures.draw_curves(self.folder)
            print(f"{self.folder}: finished; --overwrite trains again, --output_dir elsewhere")
            sys.exit()

    # Before the first step --------------------------------------------------------------------------------------------

    def load(self, problems=None):
        """(model, tokenizer, optimizer) from the newest whole checkpoint, else from --model; training problems (those
        given, else --data) and held-out ones, tokenized."""
        args = self.args
        path = self.checkpoint if self.resumed else args.model
        try:
            self.model, self.tokenizer = load_model(str(path), args.device, args.dtype, trained=True)
        except UserError as error:
            if not self.resumed:
                raise
            found = str(error).removeprefix(f"--model {path}: ")[:200]
            raise UserError(f"{path}: this checkpoint is damaged ({found}); delete it to go back to the one before")
        self.compare_prompting()
        self.chain_start = start_of_chain(args.model)
        if problems is None:
            problems = tasks.load_problems(args.data, "train", 0, args.system_prompt)
        self.problems = self.tokenize(problems)
        self.eval_problems = self.load_eval_problems()
        if args.num_prompts > len(self.problems):
            raise UserError(f"--num_prompts {args.num_prompts}: {args.data} has only {len(self.problems)}; lower it")
        ids = self.problems[0].ids
        shown = repr(self.tokenizer.decode(ids))[:1000]
        print(f"the first problem, as the model reads it: {shown}, {len(ids)} tokens")
        if args.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        train_only(self.model, args.train_blocks)
        self.optimizer = Optimizer(self.model, args, rate_factors(self.model, args.lr_below))
        self.carry("optimizer", self.optimizer)
        return self.model, self.tokenizer, self.optimizer

    def carry(self, name, optimizer):
        """Keep what an optimizer knows, its weights among it, in every checkpoint, as <name>.pt or, where several
        processes share it, a file of each. A resumed run gives it back what it knew, however many processes wrote it.
        """
        self.carried[name] = optimizer
        if self.resumed:
            path = self.checkpoint
            with explain(f"{path}/{name}.pt: cannot be read", f"delete {path} to go back"):
                optimizer.load_state_dict(sharding.read_shares(path, name))

    def compare_prompting(self):
        """Say on stderr if --model is a run that was asked its problems in another way: a model that has learnt to
        answer behind one system prompt may do nothing of the kind behind another."""
        trained = {}
        with contextlib.suppress(UserError):  # any other program may call a file args.json
            trained = read_json(Path(self.args.model) / "args.json")
        for name in ("system_prompt", "chat_template_kwargs"):
            was = trained.get(name)
            now = getattr(self.args, name)
            if was is not None and was != now:
                print(f"note: --{name} is {now!r}, but {self.args.model} was trained with {was!r}", file=sys.stderr)

    def load_eval_problems(self):
        """Held-out problems: --eval_data, else the held-out split of a built-in task, else none."""
        args = self.args
        source = args.eval_data
        if not source and args.data in tasks.built_in():
            source = args.data
        if not source or not args.eval_steps:
            return []
        return self.tokenize(tasks.load_problems(source, "test", args.eval_problems, args.system_prompt))

    def tokenize(self, problems):
        template = json.loads(self.args.chat_template_kwargs)
        return tokenize_problems(self.tokenizer, problems, self.args.max_prompt_length, template)

    def open_folder(self):
        """Make the folder ready: a new run deletes a former run's files, a resumed one cuts its logs off behind the
        checkpoint. Raises UserError if it cannot be written."""
        self.report = reporter(self.args)
        distributed.wait()  # until every process has read what lies there
        with explain(f"--output_dir {self.folder}: cannot be written", "pass another folder", OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock_folder(self.folder)
            if not self.resumed and processes.is_first():
                self.delete_former_run()
            described = dict(script=script_of(self.args), **vars(self.args), versions=versions())
            write_json(self.folder / "args.json", described)
            for name in ("metrics.jsonl", "completions.jsonl"):
                kept = read_log(self.folder / name, self.start) if self.resumed else []
                write_text(self.folder / name, to_jsonl(kept))
        if self.resumed:
            print(f"{self.folder}: resuming after step {self.start}")

    def delete_former_run(self):
        """Delete checkpoints and the mark of a finished run. Logs and final model are overwritten later."""
        (self.folder / "trainer_state.json").unlink(missing_ok=True)
        for path in (*self.folder.glob("checkpoint-*"), *self.folder.glob("best")):
            shutil.rmtree(path)

    def catch_signals(self):
        """From now on Ctrl-C, SIGTERM and a terminal that is closed let the step finish; then the run saves and stops.
        Before the first step there is nothing to save, and it stops at once."""
        with contextlib.suppress(ValueError):  # outside the main thread signals stay as they are
            for number in SIGNALS:
                signal.signal(number, self.note_signal)

    def note_signal(self, number, frame):
        """First signal: remember it for `save` and `exit_if_interrupted`. Second, or before any step: stop at once."""
        if self.stop_signal or not self.stepping:
            close_progress_bars()
            remedy = "the same command goes on from the last checkpoint" if self.stepping else "before any step"
            print(f"stopped at once; {remedy}", file=sys.stderr)
            sys.exit(128 + number)
        self.stop_signal = number
        print("\nstopping after this step (once more: at once)", file=sys.stderr)

    # Steps ------------------------------------------------------------------------------------------------------------

    def steps(self):
        """Yield (step, problems) from the first, or first not yet trained, step to --max_steps."""
        self.bar = tqdm(
            total=self.args.max_steps,
            initial=self.start,
            mininterval=1.0,
            bar_format=BAR,
            dynamic_ncols=True,
        )
        for step in range(self.start + 1, self.args.max_steps + 1):
            torch.manual_seed(step_seed(self.args.seed, step))  # for models with randomness of their own
            self.stepping = True
            self.stages = {}  # seconds by stage
            self.lap_started = time.perf_counter()
            yield step, self.batch(step)
        self.bar.close()

    def batch(self, step):
        """The problems of a step: consecutive blocks of a permutation that depends on seed and epoch only, so that
        resuming needs no stored position. The few problems left over at the end of an epoch are dropped."""
        P = self.args.num_prompts
        epoch, block = divmod(step - 1, len(self.problems) // P)
        if epoch != self.epoch:  # once an epoch: shuffling 20,000 problems takes its time
            self.epoch = epoch
            self.order = list(self.problems)
            random.Random(f"{self.args.seed}-{epoch}").shuffle(self.order)
        return self.order[block * P : (block + 1) * P]

    def lap(self, stage):
        """Charge the time since this step's last lap to `stage`."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        now = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self.lap_started
        self.lap_started = now

    def seconds(self):
        """Seconds of this step so far, as charged to its stages."""
        return sum(self.stages.values())

    def log(self, step, metrics):
        """A step's metrics, with its clock, to metrics.jsonl and --report_to; some of them onto the progress bar; and a
        warning for every fault that they tell of for the first time."""
        clock = dict(
            seconds=self.seconds(),
            seconds_by_stage=self.stages,
            peak_memory_gb=peak_memory_gb(self.model.device),
        )
        self.write_record(dict(step=step, **metrics, **clock))
        for fault, (happens, remedy) in FAULTS.items():
            if fault not in self.warnings and happens(metrics):
                self.warnings[fault] = f"warning: {fault} (first in step {step}): {remedy}"
                tqdm.write(self.warnings[fault], file=sys.stderr)
        shown = []
        for name, label in SHOWN.items():
            value = metrics.get(name)
            if isinstance(value, float):
                shown.append(f"{label}{value:.3g}")
            elif value is not None:
                shown.append(f"{label}{value}")
        self.shown = ", ".join(shown)
        self.bar.set_postfix_str(self.shown, refresh=False)
        self.bar.update()

    def log_completions(self, step, problems, rollouts, verdicts, rewards, advantages):
        """A step's B answers to completions.jsonl. verdicts: a list of B; rewards [P, G]; advantages [P, G], or None
        where there are none."""
        records = []
        for i, text in enumerate(rollouts.texts):
            p, g = divmod(i, rewards.shape[1])
            record = dict(
                step=step,
                problem=problems[p].question(),
                text=text,
                answer=last_boxed(text),
                gold=problems[p].answer,
                verdict=verdicts[i],
                reward=rewards[p, g].item(),
                length=int(rollouts.lengths[i]),
                finished=bool(rollouts.finished[i]),
                **problems[p].record(),
                advantage=None if advantages is None else advantages[p, g].item(),
            )
            records.append(record)
        append_jsonl(self.folder / "completions.jsonl", records)

    def write_record(self, record):
        """Append a record to metrics.jsonl and send it to --report_to."""
        append_jsonl(self.folder / "metrics.jsonl", [record])
        self.report(record, step=record["step"])

    def stop_if_ungraded(self, step, verdicts):
        """Raise UserError if more than --max_grader_errors of a step's answers got no verdict."""
        verifier.refuse_ungraded(verdicts, self.args.max_grader_errors, f"step {step}")

    def evaluate(self, step):
        """Where due: sampled and greedy accuracy on held-out problems and the KL to the starting model, into
        metrics.jsonl."""
        args = self.args
        due = args.eval_steps and (step % args.eval_steps == 0 or step >= args.max_steps)
        done_before = step == 0 and self.resumed
        if not self.eval_problems or not due or done_before:
            return
        if step == 0:
            asked = f"{len(self.eval_problems)} held-out problems"
            print(f"{self.folder}: evaluating on {asked}, then {args.max_steps} steps")
        else:
            self.bar.set_postfix_str("evaluating")
        inputs = (self.model, self.tokenizer, self.eval_problems)
        settings = dict(
            max_completion_length=args.max_completion_length,
            max_rollout_tokens=args.max_rollout_tokens,
            grade_timeout=args.grade_timeout,
        )
        seed = step_seed(args.seed, "evaluation")  # the same at every step: less noise between evaluations
        sampled = common.evaluate(*inputs, args.eval_samples, args.eval_temperature, seed=seed, **settings)
        greedy = common.evaluate(*inputs, 1, 0.0, **settings)
        verdicts = sampled["verdicts"] + greedy["verdicts"]
        verifier.refuse_ungraded(verdicts, args.max_grader_errors, f"evaluation at step {step}")
        record = dict(step=step, eval_ungraded=sum(verdicts.count(name) for name in verifier.NO_VERDICT))
        for name, value in sampled.items():
            if isinstance(value, float):
                record[f"eval_{name}"] = value
        record["eval_greedy_accuracy"] = greedy["accuracy"]
        is_start = step == 0 and self.chain_start == args.model
        record["kl_to_start"] = 0.0 if is_start else self.kl_to_start(sampled["rollouts"])
        self.write_record(record)
        tqdm.write(evaluation_line(record))
        if step > 0:
            self.bar.set_postfix_str(self.shown)

    def keep_best(self, step, problems):
        """Where an evaluation is due: accuracy on `problems`, which no other number is taken from, and the model of the
        best step so far into the folder best/ -> that accuracy; None where none is due, or without problems.

        The accuracies of earlier steps are read from metrics.jsonl, where the caller logs them as validation_accuracy.
        """
        args = self.args
        if not problems or not args.eval_steps or step % args.eval_steps:
            return None
        found = common.evaluate(
            self.model,
            self.tokenizer,
            problems,
            args.eval_samples,
            args.eval_temperature,
            args.max_completion_length,
            args.grade_timeout,
            max_rollout_tokens=args.max_rollout_tokens,
        )
        verifier.refuse_ungraded(found["verdicts"], args.max_grader_errors, f"validation at step {step}")
        best = 0.0
        for record in read_log(self.folder / "metrics.jsonl"):
            best = max(best, record.get("validation_accuracy") or 0.0)
        if found["accuracy"] > distributed.of_first(best):
            self.write_model(self.folder / "best", step)
        return found["accuracy"]

    def kl_to_start(self, rollouts):
        """KL in nats per token to --model; where that is a run itself, to the model with which the chain of runs began.
        It is loaded for this pass only and freed on return."""
        args = self.args
        start, _ = load_model(self.chain_start, args.device, args.dtype)
        found = kl_between(self.model, start, rollouts, args.micro_batch_tokens, args.eval_temperature)
        del start
        sharding.free_unused()
        return found

    # Saving -----------------------------------------------------------------------------------------------------------

    def save(self, step):
        """A checkpoint where due, or when a signal came; older ones than --save_total_limit are deleted."""
        args = self.args
        self.agreed_signal = distributed.largest(self.stop_signal or 0)
        due = args.save_steps and step % args.save_steps == 0 and step < args.max_steps
        if not due and not self.agreed_signal:
            return
        self.write_model(self.folder / f"checkpoint-{step}", step)
        if args.save_total_limit and processes.is_first():
            whole = [path for path in self.folder.glob("checkpoint-*") if step_of(path)]
            whole.sort(key=step_of)
            for path in whole[: -args.save_total_limit]:
                shutil.rmtree(path)

    def exit_if_interrupted(self, step):
        """After a signal: say how to resume and end the program with the signal's exit status."""
        if self.agreed_signal:
            self.bar.close()
            self.repeat_warnings()
            print(f"stopped after step {step}; the same command resumes from {self.folder}", file=sys.stderr)
            sys.exit(128 + self.agreed_signal)

    def repeat_warnings(self):
        sys.stderr.writelines(f"{warning}\n" for warning in self.warnings.values())

    def write_model(self, folder, step):
        """A `from_pretrained` folder with tokenizer, optimizers and the step after which it was written: whole or not
        at all, since it gets its name only when everything is on the disk. Raises UserError if the disk is full."""
        temporary = folder.with_suffix(".tmp")
        remedy = "make room or make it writable, then repeat the command to go on from the checkpoint before"
        try:
            with explain(f"{folder}: cannot be written", remedy):
                if processes.is_first():
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir()
                distributed.wait()
                self.write_weights(temporary)
                for name, optimizer in self.carried.items():
                    path = temporary / sharding.file_of_share(name)
                    torch.save(optimizer.state_dict(), path)
                    sync(path)
                distributed.wait()
                if processes.is_first():
                    write_json(temporary / "trainer_state.json", {"step": step})
                    self.give_name(temporary, folder)
        finally:
            if processes.is_first():
                shutil.rmtree(temporary, ignore_errors=True)  # there is none where all went well

    def write_weights(self, folder):
        """Model and tokenizer, as `from_pretrained` reads them. All processes gather the weights, one writes them."""
        with sharding.whole_weights(self.model):
            if processes.is_first():
                self.model.save_pretrained(folder, state_dict=sharding.weights_to_save(self.model))
                self.tokenizer.save_pretrained(folder)

    def give_name(self, temporary, folder):
        """Rename a model folder when everything in it is on the disk."""
        for path in temporary.rglob("*"):
            if path.is_file():
                sync(path)
        sync(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
        sync(self.folder)

    def finish(self):
        """Model, tokenizer and optimizers into the run folder itself, then the curves."""
        self.write_model(self.folder / "final", max(self.start, self.args.max_steps))
        if processes.is_first():
            self.move_final_model()
            figures.draw_curves(self.folder)
        distributed.wait()
        self.release_signals()
        self.repeat_warnings()
        self.say_what_came_out()

    def move_final_model(self):
        final = self.folder / "final"
        (self.folder / "trainer_state.json").unlink(missing_ok=True)
        for name in self.carried:
            for path in self.folder.glob(f"{name}*.pt"):  # of a shorter run, by another number of processes maybe
                path.unlink()
        for path in sorted(final.iterdir()):  # trainer_state.json marks a finished run: it is the last to move
            shutil.rmtree(self.folder / path.name, ignore_errors=True)  # of a folder: some tokenizers' chat templates
            os.replace(path, self.folder / path.name)
        final.rmdir()
        sync(self.folder)

    def say_what_came_out(self):
        """Accuracy before and after, the time it took, what lies in the folder, and what to look at next."""
        records = read_log(self.folder / "metrics.jsonl")
        minutes = sum(record.get("seconds", 0.0) for record in records) / 60
        evaluations = [record for record in records if "eval_accuracy" in record]
        if evaluations:
            first = evaluations[0]
            last = evaluations[-1]
            sampled = f"{first['eval_accuracy']:.3f} -> {last['eval_accuracy']:.3f} sampled"
            greedy = f"{first['eval_greedy_accuracy']:.3f} -> {last['eval_greedy_accuracy']:.3f} greedy"
            print(f"held-out accuracy: {sampled}, {greedy}")
        print(f"{self.folder}: model, logs, completions, curves.png; {minutes:.1f} minutes of steps")
        if self.args.model == "embedded":
            print(f"next: python analyze_entropy.py {EMBEDDED_MODEL} {self.folder}")

    def release_signals(self):
        """Signals end the program at once again. Only now: they must not cut the writing short."""
        with contextlib.suppress(ValueError):  # outside the main thread
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)


def script_of(args):
    """The name of the file whose Args these are: grpo.py, say."""
    return Path(inspect.getfile(type(args))).name


def versions():
    """What a number depends on besides the options: versions of Python and the libraries, and this repository's commit,
    '' where that is unknown."""
    commit = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        commit=commit,
    )


def step_seed(*parts):
    """A seed made of all `parts` (run seed and step, say), so that resuming needs no stored generator state."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "big")


@torch.no_grad()
def kl_between(model, other, rollouts, micro_batch_tokens, temperature=1.0):
    """KL(model || other) in nats per token on completions sampled from `model`: the mean of k3 = exp(x) - x - 1 with
    x = logp_other - logp_model, which is unbiased and never negative (http://joschu.net/blog/kl-approx.html)."""
    total = 0.0
    for rows in common.micro_batches(rollouts, range(len(rollouts.ids)), micro_batch_tokens):
        logps, _ = common.completion_logps(model, rollouts, rows, temperature)
        other_logps, _ = common.completion_logps(other, rollouts, rows, temperature)
        x = (other_logps - logps).clamp(-20, 20)
        k3 = x.exp() - x - 1
        total += float((k3 * rollouts.mask[rows]).sum())
    total = distributed.summed(dict(nats=total))["nats"]
    return total / float(rollouts.mask.sum())


def evaluation_line(record):
    """An evaluation's record as one line of 80 columns."""
    accuracy = f"accuracy {record['eval_accuracy']:.3f} sampled, {record['eval_greedy_accuracy']:.3f} greedy"
    length = f"{record['eval_response_length']:.1f} tokens"
    entropy = f"entropy {record['eval_entropy']:.3f}"
    return f"step {record['step']}: {accuracy}; {length}, {entropy}, KL {record['kl_to_start']:.4f}"


def peak_memory_gb(device):
    """Peak memory of this process in 10^9 bytes: of the GPU it trains on, on CPU what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reporter(args):
    """A function (record, step=...) that logs to --report_to. Raises UserError if that package is not installed."""
    if args.report_to == "none" or not processes.is_first():
        return lambda record, step: None
    with explain(f"--report_to {args.report_to}: not installed", "pip install it, or take none", ImportError):
        tracker = __import__(args.report_to)
    tracker.init(project=Path.cwd().name, name=args.output_dir, config=vars(args))
    return tracker.log


# What goes wrong in training without an error -------------------------------------------------------------------------


def no_signal(metrics):
    warming_up = metrics.get("phase") == "warm-up"  # the policy waits
    return metrics.get("optimizer_steps") == 0 and not metrics["skipped_steps"] and not warming_up


def all_truncated(metrics):
    return metrics.get("truncated_share") == 1


def sampler_and_trainer_disagree(metrics):
    gap = metrics.get("logp_gap")  # None in phase one of bottom-up training
    return gap is not None and gap > 0.05  # nats per token; rounding in bf16 gives about 0.01


def internal_policy_is_foreign(metrics):
    logp = metrics.get("trained_logp")  # None where no token was trained
    return metrics.get("phase") == "internal" and logp is not None and logp < -10


def entropy_collapsed(metrics):
    return metrics.get("entropy", 1) < 1e-3


def updates_vanish(metrics):
    share = metrics.get("updated_share")
    return share is not None and share < 0.5


def gradient_is_not_finite(metrics):
    return metrics.get("skipped_steps", 0) > 0


def verifier_is_defeated(metrics):
    return metrics.get("grader_timeouts", 0) + metrics.get("grader_errors", 0) > 0


# Name -> (when, told from a step's metrics; what it means, and what to try).
FAULTS = {
    "no signal": (
        no_signal,
        "every group's rewards are all equal: nothing was learnt; take easier or harder --data, or prime with sft.py",
    ),
    "all truncated": (
        all_truncated,
        "no answer ended; raise --max_completion_length, or check that the chat template writes the model's end token",
    ),
    "log-prob gap": (
        sampler_and_trainer_disagree,
        "sampler and trainer disagree: what is trained is not what was sampled; try --dtype float32",
    ),
    "foreign internal policy": (
        internal_policy_is_foreign,
        "it gives the samples less than e^-10 a token: ratio and gradients rest on tokens that it would never choose, "
        "as with tied embeddings and no norm; pass --internal_norm true, a higher --internal_layer, or both",
    ),
    "entropy collapse": (
        entropy_collapsed,
        "samples hardly differ any more; go back to an earlier checkpoint, or lower --learning_rate",
    ),
    "vanishing updates": (
        updates_vanish,
        "most are below the precision of the weights and change nothing; raise --learning_rate",
    ),
    "non-finite gradient": (
        gradient_is_not_finite,
        "it updated nothing, and ten in a row end the run; lower --learning_rate, or try --dtype float32",
    ),
    "verifier": (
        verifier_is_defeated,
        "answers that defeat it score 0: see grader_timeouts, grader_errors; --grade_timeout gives it more time",
    ),
}
