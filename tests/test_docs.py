"""README.md and docs/: what they name exists. A reader cannot tell a typing error of ours from an own one."""

import contextlib
import functools
import importlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
from helpers import ROOT, read_jsonl

import bupo
import em
import grpo
import ppo
import sft
from plumbing.options import RunArgs
from variants import dapo

PAGES = sorted(str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SUBCOMMANDS = {"analyze_trajectory.py": ("descent", "landscape", "prune", "behaviours")}
PYTHON_FILE = re.compile(r"(?:[\w/]+/)?\w+\.py\b")


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def code_blocks(page):
    """The contents of the fenced blocks of a page, without diffs."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)
    return [block for language, block in blocks if language != "diff"]


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)


def inline_code(page):
    """What stands between single backticks, on one line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


# Commands -------------------------------------------------------------------------------------------------------------


def expand(block):
    """Lines of a shell script with the variables replaced that the script itself sets; comments and line ends removed.

    Variables of loops stay as they are: they stand in values only.
    """
    variables = {}
    lines = []
    for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line)
        line = re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match.group(1), match.group()), line)
        for name, quoted, bare in re.findall(r"\b(\w+)=(?:\"([^\"]*)\"|([^\s\";]+))", line):
            variables[name] = quoted or bare
        lines.append(line)
    return lines


def commands_in(line):
    """Every script that a line runs, with the words that follow it."""
    found = []
    for part in re.split(r"[;|&\"]|\bdo\b|\bdone\b", line):
        words = part.split()
        for i, word in enumerate(words):
            if PYTHON_FILE.fullmatch(word):
                found.append((word, words[i + 1 :]))
                break
    return found


# Files that an exercise of docs/course.md has the reader make, and the script that it copies for them.
READERS_OWN = {"by_hand.py": None, "my_opo.py": "grpo.py", "tasks/largest.py": None}


def commands(page):
    """(script, words behind it) of every command of a page, in its blocks and in its sentences."""
    found = []
    for block in code_blocks(page):
        for line in expand(block):
            found += commands_in(line)
    for code in inline_code(page):
        if code.startswith("python "):
            found += commands_in(code)
    found = [(READERS_OWN.get(script, script), words) for script, words in found]
    return [(script, words) for script, words in found if script]


def options_in(words):
    return {word.split("=")[0].strip(",") for word in words if re.match(r"--\w", word)} - {"--help"}


@functools.cache
def help_of(script, *subcommand):
    """What `python script --help` prints. In this process, because every other one would import torch anew."""
    words, path, printed = sys.argv, list(sys.path), io.StringIO()
    sys.argv = [script, *subcommand, "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = words
        sys.path[:] = path
    assert not stopped.value.code, f"{script} --help fails"
    return printed.getvalue()


def options_of(script, words=()):
    """The options of a script, or of that one of its sub-commands that the words name."""
    subcommand = [word for word in words[:1] if word in SUBCOMMANDS.get(script, ())]
    return set(re.findall(r"--\w+", help_of(script, *subcommand)))


def every_option():
    """The options of all scripts that a page shows with an option."""
    found = set()
    for page in PAGES:
        for script, words in commands(page):
            if options_in(words):
                found |= options_of(script, words)
    for script, subcommands in SUBCOMMANDS.items():
        for subcommand in subcommands:
            found |= options_of(script, [subcommand])
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_command_can_be_typed_as_it_stands(page):
    """The first thing a newcomer does is to copy a command. An option that was renamed since ends the acquaintance."""
    for script, words in commands(page):
        assert (ROOT / script).is_file(), f"{page}: {script}"
        named = options_in(words)
        if named:
            assert named <= options_of(script, words), f"{page}: python {script} {' '.join(words)}"


def test_the_commands_are_found_in_loops_too():
    """A reader of pages that finds no command would agree with every page."""
    block = 'm="--max_steps 6 --nonsense"\nfor s in 0 1; do echo "python sft.py $m --seed $s"; done | $two\n'
    found = [command for line in expand(block) for command in commands_in(line)]
    assert found == [("sft.py", ["--max_steps", "6", "--nonsense", "--seed", "$s"])]
    assert options_in(found[0][1]) - options_of("sft.py") == {"--nonsense"}
    assert {script for script, _ in commands("docs/results.md")} >= {"em.py", "grpo.py", "evaluate.py", "sft.py"}
    assert {script for script, _ in commands("docs/priming.md")} >= {"sft.py", "grpo.py", "analyze_trajectory.py"}


@pytest.mark.parametrize("page", PAGES)
def test_every_option_named_in_a_sentence_exists(page):
    named = {code.split()[0] for code in inline_code(page) if code.startswith("--")}
    assert named <= every_option()


# Links and names ------------------------------------------------------------------------------------------------------


def anchors(page):
    """The #anchors that GitHub makes of a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(text.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_image_leads_somewhere(page):
    """A dead link is found by the reader who needed the page behind it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.resolve().relative_to(ROOT)), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_in_a_sentence_exists(page):
    for code in inline_code(page):
        is_file = PYTHON_FILE.fullmatch(code) or code in ("requirements.txt", "CITATION.cff")
        is_folder = re.fullmatch(r"(docs|tests|tasks|plumbing|benchmarks|variants)/\S*", code)
        if (is_file or is_folder) and code not in READERS_OWN:
            assert (ROOT / code).exists(), f"{page}: {code}"


def test_what_the_reader_makes_is_made_on_a_page():
    """An excuse for a missing file must not outlive the exercise that makes it."""
    made = set(re.findall(r"^\+\+\+ b/(\S+)", read("docs/solutions.md"), re.MULTILINE))
    assert {name for name in made if not (ROOT / name).exists()} == set(READERS_OWN)
    assert "cp grpo.py my_opo.py" in read("docs/course.md")


def dotted_names(text):
    """What reads like module.function of this project: grpo.loss, common.hidden_states, plumbing.models.load_model."""
    own = {path.stem for path in ROOT.glob("*.py")} | {"tasks", "plumbing", "benchmarks", "variants"}
    names = re.findall(r"(?<![\w./])[a-z_]+(?:\.\w+)+", text)
    endings = ("py", "md", "json", "jsonl", "png", "svg", "txt")
    return [name for name in names if name.split(".")[0] in own and name.split(".")[-1] not in endings]


def resolve(name):
    """The object behind a dotted name. Raises ImportError or AttributeError."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:i]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", [*PAGES, "docs/step.svg"])
def test_every_function_named_exists(page):
    """The table from formula to function, and the figure, are why the pages are opened beside the code."""
    text = read(page) if page.endswith(".svg") else " ".join(inline_code(page))
    for name in dotted_names(text):
        resolve(name)


def test_the_names_in_the_figure_and_the_table_are_found():
    assert {"common.sample", "grpo.loss", "tasks.load_problems"} <= set(dotted_names(read("docs/step.svg")))
    assert {"opo.loss", "em.loss", "bupo.main"} <= set(dotted_names(read("docs/reference.md")))
    with pytest.raises((AttributeError, ImportError)):
        resolve("common.no_such_function")


def test_the_readme_is_one_page():
    """What grows a paragraph at a time is read by nobody in the end. The rest belongs into docs/."""
    assert len(read("README.md").splitlines()) <= 170


# The reference --------------------------------------------------------------------------------------------------------


def listed_options():
    """(name, default) of every row of the reference's tables of options, as they are written."""
    section = read("docs/reference.md").split("## Options")[1].split("\n## ")[0]
    return re.findall(r"^\| `--(\w+)` \| (.*?) \|", section, re.MULTILINE)


def is_default(written, value):
    """Whether a cell of the table says this value. A cell that is neither code nor 'none' describes it in words."""
    if written == "none":
        return value in ("", None, [])
    code = re.fullmatch(r"`(.*)`", written)
    if code is None:
        return True
    if type(value) in (int, float):
        return float(code.group(1)) == value
    return code.group(1) == str(value)


def test_the_reference_lists_every_option_with_its_default():
    """An option that no page mentions is found by chance; a default that has changed since misleads.

    The default is that of the first of these scripts which has the option.
    """
    scripts = [RunArgs(), grpo.Args(), bupo.Args(), ppo.Args(), dapo.Args(), em.Args(), sft.Args()]
    listed = dict(listed_options())
    fields = {name for args in scripts for name in vars(args)}
    assert fields == set(listed)
    for name, written in listed.items():
        owner = next(args for args in scripts if hasattr(args, name))
        assert is_default(written, getattr(owner, name)), f"--{name} {written}"


def test_the_reference_explains_every_metric(run_folder):
    """metrics.jsonl is read with this table at hand."""
    section = read("docs/reference.md").split("## Metrics")[1].split("\n## ")[0]
    explained = set(re.findall(r"`(\w+)`", section))
    logged = {name for record in read_jsonl(Path(run_folder) / "metrics.jsonl") for name in record}
    assert logged - explained <= {"step"}
