"""The run folder: what is deleted and when, what is kept, and a disk that is full."""

import resource
import shutil
from pathlib import Path

import pytest
from helpers import arguments, assert_same_run, interrupt

import grpo
from plumbing.errors import one_line_errors
from plumbing.files import append_jsonl
from plumbing.models import load_model

FOUR_STEPS = dict(max_steps=4, num_prompts=3, save_steps=1, save_total_limit=0)


@pytest.fixture
def args_for(model_folder, data):
    """A function (options) -> Args of grpo.py for four steps."""
    return lambda **options: arguments(grpo, model_folder, data, **FOUR_STEPS | options)


def checkpoints(folder="run"):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


def test_a_finished_run_says_so_in_one_line(args_for, capsys):
    """The same command twice must neither train again over the results nor end in an error."""
    grpo.main(args_for())
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        grpo.main(args_for())
    assert not end.value.code  # exit status 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 and "--overwrite" in said.out and not said.err
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


def test_overwrite_trains_again(args_for):
    """Leftovers of the run before, a checkpoint say, must not find their way into the new one."""
    grpo.main(args_for(output_dir="whole"))
    grpo.main(args_for(seed=5, max_steps=6))
    grpo.main(args_for(overwrite=True))
    assert_same_run("run", "whole")
    assert checkpoints() == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_checkpoints_beyond_the_limit_go(args_for):
    """Sixteen bytes a parameter and checkpoint: without a limit a long run fills the disk and dies saving."""
    grpo.main(args_for(save_total_limit=2))
    assert checkpoints() == ["checkpoint-2", "checkpoint-3"]


def test_a_tokenizer_with_several_templates_is_saved(args_for, model_folder):
    """Some tokenizers save a folder of further chat templates: found at the end of a run, it would lose the run."""
    shutil.copytree(model_folder, "several")
    _, tokenizer = load_model("several")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    tokenizer.save_pretrained("several")
    for max_steps in (1, 2):  # the second time the folder is there already
        grpo.main(args_for(model="several", max_steps=max_steps))
    assert [path.name for path in Path("run").iterdir() if path.is_dir() and "template" in path.name]


@pytest.mark.parametrize("room", [1000, 200_000])
def test_a_full_disk_costs_no_checkpoint(room, args_for, capsys):
    """No file may grow beyond `room` bytes: the new checkpoint fails in its weights or in its optimizer; the old one
    must stay, nothing half-written may, and the user reads one line."""
    grpo.main(args_for(output_dir="whole"))
    interrupt(grpo, args_for(), 2)
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    logs = max(Path(f"run/{name}.jsonl").stat().st_size for name in ("metrics", "completions"))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(room, 4 * logs), hard))
        with pytest.raises(SystemExit) as end, one_line_errors():
            grpo.main(args_for())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert end.value.code == 2 and "cannot be written" in capsys.readouterr().err.splitlines()[-1]
    assert checkpoints() == ["checkpoint-1", "checkpoint-2"]
    grpo.main(args_for())
    assert_same_run("run", "whole")


def test_a_full_disk_while_logging_is_one_line(capsys):
    """The log is written at every step: mostly it, not the checkpoint, meets the full disk first."""
    with pytest.raises(SystemExit) as end, one_line_errors():
        append_jsonl("/dev/full", [{"step": 1}])
    assert end.value.code == 2 and "No space left" in capsys.readouterr().err.splitlines()[-1]
