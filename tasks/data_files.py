"""Data from outside: rows of a file or of a data set of the Hugging Face hub, and the problems in them."""

import json
import math
import re
from pathlib import Path

import tasks
from plumbing.errors import UserError, explain
from tasks.answers import behind_hashes, last_boxed

LONGEST_LINE = 2**24  # bytes; a file without line feeds would be read as one problem
PROMPT_FIELDS = ("problem", "question", "prompt")
CONFIGS = re.compile(r"(?:available configs|Available): \[(.*?)\]", re.DOTALL)  # in what the package `datasets` says


def read_rows(source, split="train"):
    """Yield (where, row) for every row of `source`: a file, local or hf://datasets/OWNER/NAME/FILE, which is JSONL, a
    JSON array (.json) or .parquet (needs `pyarrow`); or a data set of the hub, OWNER/NAME or OWNER/NAME:CONFIG (needs
    `datasets`).

    split: of a data set of the hub. where: the source and the number of the line of JSONL, from 1, else of the row,
    from 0. row: a dict. Raises UserError naming both.
    """
    if not is_file(source):
        yield from read_hub_rows(source, split)
    elif source.endswith(".parquet"):
        yield from read_parquet_rows(source)
    elif source.endswith(".json") and is_array(source):
        yield from read_array_rows(source)
    else:
        yield from read_jsonl_rows(source)


def is_file(source):
    """True for what names a file; anything else is the name of a data set of the hub."""
    return source.startswith("hf://") or source.endswith((".json", ".jsonl", ".parquet")) or Path(source).exists()


def read_hub_rows(source, split):
    """Rows of a data set of the hub, see `read_rows`."""
    with explain(f"{source}: no such file", "if it is a hub data set, `pip install datasets` first", ImportError):
        from datasets import load_dataset
    try:
        rows = load_dataset(*source.split(":", 1), split=split)
    except Exception as error:
        raise UserError(why_not_loaded(source, split, str(error)))
    for i, row in enumerate(rows):
        yield f"{source}:{i}", row


def why_not_loaded(source, split, reason):
    """The message for a data set of the hub that `datasets` refused: its configs, if one of them is missing."""
    configs = CONFIGS.search(reason)
    if configs is None:
        return f"{source}, split {split}: cannot be loaded ({reason[:200]}); check the name"
    names = configs[1].replace("'", "")
    example = source.split(":")[0] + ":" + names.split(",")[0]
    return f"{source}: the data set has the configs {names[:300]}; pass one behind its name: {example}"


def read_parquet_rows(source):
    """Rows of a .parquet file, see `read_rows`."""
    with explain(f"{source}: cannot be read", "`pip install pyarrow` first", ImportError):
        from pyarrow import parquet
    with explain(f"{source}: cannot be read", "check name and network, or pass another file"):
        rows = parquet.read_table(local_path(source)).to_pylist()
    for i, row in enumerate(rows):
        yield f"{source}:{i}", row


def is_array(source):
    """Whether a file of JSON is one array, not a row a line."""
    with open_file(source) as file:
        return file.read(1024).lstrip().startswith(b"[")


def read_array_rows(source):
    """Rows of a JSON array, see `read_rows`."""
    with open_file(source) as file, explain(f"{source}: not a JSON array in UTF-8", "mend the file"):
        rows = json.loads(file.read().decode("utf-8"))
    for i, row in enumerate(rows):
        where = f"{source}:{i}"
        yield where, parsed_row(where, json.dumps(row).encode())


def open_file(source):
    """A file of bytes, local or of the hub. Raises UserError."""
    with explain(f"{source}: cannot be read", "check name and network, or pass a local file"):
        return open(local_path(source), "rb")


def read_jsonl_rows(source):
    """Rows of a JSONL file, see `read_rows`. Blank lines are skipped, but counted."""
    with open_file(source) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):  # up to a line feed only: other separators may stand in texts
            number += 1
            where = f"{source}:{number}"
            if len(line) > LONGEST_LINE:
                raise UserError(f"{where}: a line of more than {LONGEST_LINE} bytes; each line should hold one problem")
            if line.strip():
                yield where, parsed_row(where, line)


def parsed_row(where, line):
    """The JSON object in a line of bytes, a dict. Raises UserError, for half a character ('\\ud800'), too."""
    with explain(f"{where}: not a JSON object in UTF-8", "mend the line"):
        row = dict(json.loads(line.decode("utf-8")).items())
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    return row


def local_path(source):
    """Where a file lies on this machine. One of the hub is downloaded first, unless it is there already."""
    if not source.startswith("hf://datasets/"):
        return Path(source)
    from huggingface_hub import hf_hub_download

    owner, name, file = source.removeprefix("hf://datasets/").split("/", 2)
    return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset"))


def is_prompt(value):
    """True for text and for chat messages: [{'role': text, 'content': text}, ...], neither of them empty."""
    if not isinstance(value, list):
        return is_text(value)
    for message in value:
        if not isinstance(message, dict):
            return False
        if not is_text(message.get("role")) or not is_text(message.get("content")):
            return False
    return len(value) > 0


def is_text(value):
    """True for a string with more than blanks in it."""
    return isinstance(value, str) and value.strip() != ""


def fields_of(row):
    """What a row holds, for messages: 'found fields text, label'."""
    names = ", ".join(str(name) for name in row)
    return f"found fields {names or 'none'}"[:300]


def problem_from_row(where, row, labels=True):
    """One row -> Problem. Fields: problem | question | prompt, and answer | final_answer | solution (with a box). Of an
    answer with ####, as GSM8K has them, what stands behind the last one.

    where: goes into messages. labels=False lets a row without answer through: its answer is ''. Raises UserError.
    """
    prompt = find_prompt(row)
    if prompt is None:
        fields = "'problem', 'question' or 'prompt'"
        raise UserError(f"{where}: no problem; put text or messages into {fields}; {fields_of(row)}")
    refuse_answered(where, prompt)
    answer = behind_hashes(find_answer(row))
    if labels and not answer:
        fields = "'answer', 'final_answer' or a boxed 'solution'"
        raise UserError(f"{where}: no gold answer; put it into {fields}; {fields_of(row)}")
    return tasks.Problem(prompt, answer, where)


def refuse_answered(where, prompt):
    """Raise UserError for chat messages whose last word is the assistant's: the model would be asked to answer its own
    answer, and most chat templates let that pass."""
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise UserError(f"{where}: its messages end with the assistant's answer; drop that message from the prompt")


def find_prompt(row):
    """The first of a row's fields that holds a prompt, or None."""
    for name in PROMPT_FIELDS:
        if is_prompt(row.get(name)):
            return row[name]
    return None


def find_answer(row):
    """What a row gives as its gold answer, as text without blanks around it, or ''. 0 is an answer; True, NaN and
    Infinity, which JSON writers put where a number is missing, are none."""
    boxed_solution = last_boxed(str(row.get("solution")))
    for value in (row.get("answer"), row.get("final_answer"), boxed_solution):
        if isinstance(value, float) and not math.isfinite(value):
            continue
        if type(value) in (str, int, float) and str(value).strip():
            return str(value).strip()
    return ""
