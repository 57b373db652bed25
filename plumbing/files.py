"""Small files of a run: JSON and JSON lines, written whole or not at all, and read back with care."""

import json
import math
import os

from plumbing.errors import explain


def read_json(path):
    """The object in a JSON file of a run folder, a dict. Raises UserError."""
    with explain(f"{path}: cannot be read", "--overwrite trains again, --output_dir elsewhere"):
        return dict(json.loads(path.read_text()).items())


def write_json(path, value):
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path, text):
    """Write a file whole or not at all: under a temporary name first, which then replaces the old file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def to_jsonl(records):
    """Records -> one line of JSON each."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def append_jsonl(path, records):
    """Add records to the end of a JSONL file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(to_jsonl(records))


def read_log(path, step=math.inf):
    """The records of a JSONL log up to a step, as a list; [] without the file. A line cut off by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text("utf-8", "replace").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records.append(record)
    return [record for record in records if record["step"] <= step]


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
