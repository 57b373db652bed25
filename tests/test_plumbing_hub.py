"""The hub, played by a local server: models and data sets come through huggingface_hub; only what is safe is read."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import ROOT, read_jsonl, run_script


@pytest.fixture
def hub(tmp_path, model_folder, data, monkeypatch):
    """A hub that holds the model 'lab/good', the same as pickles in 'lab/pickled', and the data set 'lab/sums'."""
    root = tmp_path / "hub"
    shutil.copytree(model_folder, root / "lab/good", ignore=shutil.ignore_patterns("*.jsonl", "optimizer.pt", "check*"))
    shutil.copytree(root / "lab/good", root / "lab/pickled")
    (root / "lab/pickled/model.safetensors").rename(root / "lab/pickled/pytorch_model.bin")
    (root / "datasets/lab/sums").mkdir(parents=True)
    shutil.copy(data, root / "datasets/lab/sums/train.jsonl")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            address = re.match(r"/(?:api/(?:models/)?)?((?:datasets/)?\w+/\w+)/?(?:resolve/main/)?([^?]*)", self.path)
            repository, name = address.groups()
            path = root / repository / name
            found = path.is_file()
            body = path.read_bytes() if found else b"{}"
            self.send_response(200 if found else 404)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{len(body)}-{hash(body)}"')
            self.send_header("Content-Length", str(len(body)))
            if not found:
                known = (root / repository).is_dir()
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.end_headers()
            return body

        def do_GET(self):
            self.wfile.write(self.do_HEAD())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield server
    server.shutdown()


def test_a_model_and_its_data_come_from_the_hub(hub):
    """The way most people will run it."""
    source = "--model lab/good --data hf://datasets/lab/sums/train.jsonl --output_dir run"
    numbers = "--max_steps 1 --num_minibatches 1 --num_prompts 2 --num_generations 4 --max_completion_length 10"
    run = run_script("grpo.py", *source.split(), *numbers.split(), "--eval_steps", "0")
    assert run.returncode == 0, run.stderr
    assert len(read_jsonl("run/completions.jsonl")) == 8
    assert json.loads(Path("run/args.json").read_text())["model"] == "lab/good"


# In a process of its own, since huggingface_hub looks at its environment when it is imported.
READ = """
import tasks
from plumbing.errors import UserError
from plumbing.models import load_model

for read, source in (
    (load_model, "lab/none"),
    (load_model, "lab/pickled"),
    (tasks.load_problems, "hf://datasets/lab/sums/absent.jsonl"),
):
    try:
        print(read(source))
    except UserError as error:
        print(" ".join(str(error).split()))
"""


def test_what_the_hub_lacks_or_holds_as_pickle_is_one_line(hub):
    """A misspelt name is the commonest mistake of all; and weights that are pickles would run code when read."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, env=environment)
    none, pickled, absent = run.stdout.splitlines()
    assert none.startswith("--model lab/none: cannot be loaded (lab/none is not a")
    assert pickled.startswith("--model lab/pickled: cannot be loaded")
    assert absent.startswith("hf://datasets/lab/sums/absent.jsonl: cannot be read (404")
