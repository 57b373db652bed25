"""Run folders as another script finds them: finished or not, how they are called, how long they took."""

import re
import sys
from pathlib import Path

from plumbing.errors import UserError
from plumbing.files import is_step, read_json, read_log
from plumbing.options import EMBEDDED_MODEL

LARGEST_NUMBER = 1e100  # that is added up or drawn: sums of more might overflow


def step_of(folder):
    """The step after which a model folder was written whole; 0 for one that was not ('checkpoint-20.tmp', say)."""
    state = folder / "trainer_state.json"
    if folder.suffix == ".tmp" or not state.is_file():
        return 0
    step = read_json(state).get("step", 0)
    if not is_step(step):
        remedy = "delete that folder to go back to an earlier checkpoint, or take another --output_dir"
        raise UserError(f"{state}: its step {step!r} is no number of a step; {remedy}")
    return step


def find_run(path):
    """The run folder that a model belongs to: its own, or the one around a checkpoint; None for any other model.

    path: text, as it stands on the command line. Raises UserError for a missing folder and for an unfinished run.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or can_only_be_a_folder(path):
            raise UserError(f"{path}: no such folder; pass a run folder, a model folder or a hub id")
        return None
    if (folder / "args.json").is_file():
        run = folder
    elif (folder.parent / "args.json").is_file():
        run = folder.parent
    else:
        return None
    # What else lies inside a run, such as the folder best/, is no checkpoint and tells no step.
    tells_its_step = run == folder or folder.name.startswith("checkpoint-")
    if tells_its_step and not step_of(folder):
        raise UserError(f"{path}: unfinished, no trainer_state.json; repeat its training command to finish it")
    return run


def start_of_chain(model):
    """The model that a chain of runs began with: 'runs/em' -> 'embedded', where em.py trained the embedded model. Only
    reinforcement learning makes a chain: a model that it has not trained, such as one of sft.py, is its own start.

    What a former run started from may be gone. Then the chain begins behind it, and a line on stderr says so.
    """
    start = model
    passed = [start]
    while True:
        trained = options_of(start)
        if trained.get("script") in (None, "sft.py") or not isinstance(trained.get("model"), str):
            return start
        before = trained["model"]
        gone = can_only_be_a_folder(before) and not Path(before).is_dir()
        if gone or before in passed:
            print(f"note: the KL is to {start}; {before}, from which that was trained, is gone", file=sys.stderr)
            return start
        start = before
        passed.append(start)


def options_of(model):
    """The options that a model was trained with, a dict: args.json of its run folder; {} for any other model."""
    folder = Path(model)
    if re.match("checkpoint-|best$", folder.name):
        folder = folder.parent
    try:
        return read_json(folder / "args.json")
    except UserError:  # there is none, or another program's
        return {}


def can_only_be_a_folder(path):
    """False for what may be a hub id. 'runs/grpo' may be one, but not where there is a folder 'runs'."""
    if path.startswith((".", "/")) or path.count("/") > 1:
        return True
    return "/" in path and Path(path).parent.is_dir()


def labels_of(paths):
    """The shortest ends of paths that tell them apart: runs/grpo, runs/em -> grpo, em.

    A model inside a run bears the run's name: em/best, grpo/checkpoint-100. Raises UserError for a path given twice.
    """
    parts = [Path(path.removesuffix(".jsonl")).parts for path in paths]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        labels = [last_names(names, length) for names in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise UserError(f"{' '.join(paths)}: one of them is listed twice; drop it")


def last_names(names, length):
    """The last names of a path, joined; of a model inside a run at least two."""
    if re.match("checkpoint-|best$", names[-1]):
        length = max(length, 2)
    return "/".join(names[-length:])


def experiment(label):
    """The label of a run without its seed: grpo-0 -> grpo, em-1/best -> em/best. A checkpoint keeps its step."""
    return re.sub(r"(?<!checkpoint)-\d+(?=/|$)", "", label)


def training_seconds(path):
    """Time that a run spent in training steps, without evaluations and saving; None for a model that is no run."""
    if path == str(EMBEDDED_MODEL):
        return None
    records = read_log(Path(path) / "metrics.jsonl")
    seconds = [record["seconds"] for record in records if is_number(record.get("seconds"))]
    return sum(seconds) if seconds else None


def is_number(value):
    """True for a number that can be drawn and added up: neither true nor false, neither nan nor infinite."""
    return type(value) in (int, float) and abs(value) <= LARGEST_NUMBER
