"""Output folders and the small files in them: looked at before the work, locked, written whole or not at all, and read
back with care."""

import fcntl
import json
import math
import os
import sys
from pathlib import Path

from plumbing import processes
from plumbing.errors import UserError, explain

# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def check_folder(folder, files=()):
    """Raise UserError, before any work, if an output folder cannot be made or written. Nothing is made yet.

    folder: as given to --output_dir. files: names of what will be written there; what bears one of them must be a file.
    """
    what = f"--output_dir {folder}"
    if not str(folder).strip():
        raise UserError("--output_dir '': names no folder; pass one")
    for path in (Path(folder), *Path(folder).absolute().parents):
        with explain(f"{what}: cannot be written", "pass another folder", OSError):
            there = exists(path)
        if there and not path.is_dir():
            raise UserError(f"{what}: {path} is no folder; pass another one")
        if there and not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"{what}: {path} cannot be written; pass another folder")
        if there:
            break
    for name in files:
        path = Path(folder, name)
        if exists(path) and not path.is_file():
            raise UserError(f"{path}: is no file, but one will be written there; move it, or pass another --output_dir")


def make_output_folder(folder):
    """Make --output_dir if it is not there -> its path. Raises UserError if it cannot be made."""
    path = Path(folder)
    with explain(f"--output_dir {path}: cannot be written", "pass another folder", OSError):
        path.mkdir(parents=True, exist_ok=True)
    return path


def exists(path):
    """True for anything of that name, a link that leads nowhere among it. Raises OSError, for a name too long, say."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


LOCKED = {}  # folders that this process keeps others out of, with the descriptors that it holds open for that


def lock_folder(folder):
    """Keep other processes out of an existing folder until this one ends, however it ends: then the kernel unlocks it.
    Of several that train together the first one does it for all.

    Raises UserError that names the process that is in there.
    """
    path = Path(folder).resolve()
    if path in LOCKED or not processes.is_first():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: {holder_of(path)} is at work there; wait for it, or pass another --output_dir")
    except OSError:  # some network disks have no locks; two processes are then the user's own care
        pass
    LOCKED[path] = descriptor


def holder_of(path):
    """Which process has locked a file, as text, as far as this system tells."""
    locks = Path("/proc/locks")  # lines such as '1: FLOCK ADVISORY WRITE 4711 08:01:131 0 EOF', 131 being the inode
    if locks.is_file():
        for line in locks.read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].endswith(f":{path.stat().st_ino}"):
                return f"process {words[4]}"
    return "another process"


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read_json(path, remedy="--overwrite trains again, --output_dir elsewhere"):
    """The object in a JSON file, of a run folder if no other remedy is given, a dict. Raises UserError."""
    with explain(f"{path}: cannot be read", remedy):
        return dict(json.loads(path.read_text()).items())


def write_json(path, value):
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path, text):
    """Write a file whole or not at all: under a temporary name first, which then replaces the old file. Its folder is
    made if there is none. Of several processes only the first one writes."""
    if not processes.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def to_jsonl(records):
    """Records -> one line of JSON each."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def append_jsonl(path, records):
    """Add records to the end of a JSONL file. Of several processes only the first one writes."""
    if not processes.is_first():
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(to_jsonl(records))


def read_log(path, step=math.inf):
    """The records of a JSONL log up to a step, as a list; [] without the file.

    What is no record, such as a line cut off by a kill, is left out; stderr says how many lines that were.
    """
    if not path.is_file():
        return []
    records = []
    left_out = 0
    for line in path.read_text("utf-8", "replace").split("\n"):
        record = parsed_record(line)
        if record is not None:
            records.append(record)
        elif line.strip():
            left_out += 1
    if left_out:
        print(f"note: {path}: left out {left_out} lines that are no records of a step", file=sys.stderr)
    return [record for record in records if record["step"] <= step]


MOST_STEPS = 2**31  # a larger number in a log is no step


def parsed_record(line):
    """The record in a line of a log, a dict with a step; None if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and is_step(record.get("step")):
        return record
    return None


def is_step(value):
    """True for the number of a step, 0 before the first."""
    return type(value) is int and 0 <= value <= MOST_STEPS


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
