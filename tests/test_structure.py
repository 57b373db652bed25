"""The house rules that reading depends on: how much a line may ask of its reader, which way imports point, that the
diff between two algorithms is the paper, and what is never run."""

import ast
import difflib
import functools
import io
import re
import tokenize

import pytest
from helpers import ROOT

import tasks


def files(*patterns):
    """Files of the repository that match, as paths from its root."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


TRUNK = "grpo.py"
VARIANTS = files("variants/*.py")
BUDGETS = {"bupo.py": 45, "opo.py": 30, "em.py": 75, "ppo.py": 80}  # added lines of code against the trunk
BUDGETS |= dict.fromkeys(VARIANTS, 30)
ALGORITHMS = [TRUNK, *BUDGETS]
GROUND = ["bookkeeping.py", "common.py"]
LESSONS = [name for name in files("*.py", "variants/*.py") if name not in GROUND]
TASKS = files("tasks/*.py")
PLUMBING = files("plumbing/*.py")
HOUSE = [*LESSONS, *GROUND, *TASKS, *PLUMBING]
AROUND = files("tests/*.py", "benchmarks/*.py")


# Reading the files ----------------------------------------------------------------------------------------------------


@functools.cache
def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def tree(name):
    return ast.parse(read(name))


@functools.cache
def nodes_of(name):
    return list(ast.walk(tree(name)))


@functools.cache
def tokens_of(name):
    return list(tokenize.generate_tokens(io.StringIO(read(name)).readline))


@functools.cache
def docstring_lines(name):
    """Numbers of the lines inside docstrings."""
    numbers = set()
    for node in nodes_of(name):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            numbers.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return numbers


@functools.cache
def code_line_numbers(name):
    """Numbers of the lines that hold code: no blank lines, comments or docstrings."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    numbers = set()
    for token in tokens_of(name):
        if token.type not in layout:
            numbers.update(range(token.start[0], token.end[0] + 1))
    return sorted(numbers - docstring_lines(name))


@functools.cache
def code_lines(name):
    """The lines of code, without comments and any whitespace."""
    lines = read(name).splitlines()
    for token in tokens_of(name):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return ["".join(lines[number - 1].split()) for number in code_line_numbers(name)]


@functools.cache
def parts(name):
    """What a file defines at its top level, name -> source, in order."""
    found = {}
    for node in tree(name).body:
        source = ast.get_source_segment(read(name), node)
        if isinstance(node, ast.Assign):
            found[node.targets[0].id] = source
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = source
        elif isinstance(node, ast.If):
            found["__main__"] = source
    return found


# Reading pace ---------------------------------------------------------------------------------------------------------

# What a file may ask of its reader at most, a little more than codebases that people enjoy reading.
PACE = {
    "nodes of the syntax tree a line": 7.0,
    "a if b else c, of 100 lines": 3.5,
    "comprehensions, of 100 lines": 7.0,
    "a, b = c, d, of 100 lines": 1.5,
    "characters a line": 58,
    "lines of the longest function, main apart": 45,
}
NODES_AROUND = 8.5  # a line, in tests/ and benchmarks/
FEW = 30  # lines of code, below which a mean says nothing


def count(nodes, *kinds):
    return sum(isinstance(node, kinds) for node in nodes)


def function_lengths(name):
    """Lines of code of every function but main."""
    lengths = [0]
    for node in nodes_of(name):
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            inside = [number for number in code_line_numbers(name) if node.lineno <= number <= node.end_lineno]
            lengths.append(len(inside))
    return lengths


def pace(name):
    """What a file asks of its reader, under the names of PACE."""
    lines = len(code_line_numbers(name))
    nodes = []
    for node in nodes_of(name):
        if isinstance(node, (ast.expr, ast.stmt)) and node.lineno not in docstring_lines(name):
            nodes.append(node)
    pairs = 0
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            pairs += isinstance(node.targets[0], ast.Tuple)
    text = read(name).splitlines()
    characters = sum(len(text[number - 1]) for number in code_line_numbers(name))
    comprehensions = count(nodes, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    found = (
        len(nodes) / lines,
        100 * count(nodes, ast.IfExp) / lines,
        100 * comprehensions / lines,
        100 * pairs / lines,
        characters / lines,
        max(function_lengths(name)),
    )
    return dict(zip(PACE, found, strict=True))


def long_enough(names):
    return [name for name in names if len(code_line_numbers(name)) >= FEW]


@pytest.mark.parametrize("name", long_enough(HOUSE))
def test_a_file_is_read_at_walking_pace(name):
    """There was a cap on lines. It was met by writing tighter, and density is what makes people stop reading."""
    found = pace(name)
    assert {measure: found[measure] for measure, most in PACE.items() if found[measure] > most} == {}


def test_tests_and_benchmarks_are_readable_too():
    """A test that nobody can read proves nothing to anybody."""
    found = {name: pace(name)["nodes of the syntax tree a line"] for name in long_enough(AROUND)}
    assert {name: nodes for name, nodes in found.items() if nodes > NODES_AROUND} == {}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_and_what_it_stands_on_are_read_in_one_sitting(name):
    """The promise of a single file is that it fits into a head, together with the one file that it needs. A second
    network, with equations of its own, takes some lines more; so do the controls of a paper's claim."""
    most = {"ppo.py": 700, "variants/dapo.py": 660, "bupo.py": 665}.get(name, 650)
    assert len(read(name).splitlines()) + len(read("common.py").splitlines()) <= most


def test_lines_fit_on_the_screen():
    """Wrapped lines make two files side by side unreadable."""
    long = []
    for name in [*HOUSE, *AROUND]:
        for number, line in enumerate(read(name).splitlines(), 1):
            if len(line) > 120:
                long.append(f"{name}:{number}")
    assert long == []


# The diff is the paper ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUDGETS)
def test_the_diff_is_the_paper(name):
    """Code that drifts apart hides the contribution: `diff -w grpo.py opo.py` must read like OPO and nothing else."""
    diff = list(difflib.unified_diff(code_lines(TRUNK), code_lines(name), n=0, lineterm=""))[2:]
    added = [line for line in diff if line.startswith("+")]
    assert 0 < len(added) <= BUDGETS[name], "\n".join(added)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_the_same_parts_in_the_same_order(name):
    """A reader who knows one file must find the same thing at the same place in the next."""
    trunk = list(parts(TRUNK))
    found = list(parts(name))
    assert trunk == ["EMBEDDED", "Args", "advantages", "loss", "main", "__main__"]
    assert [part for part in found if part in trunk] == [part for part in trunk if part in found]
    assert found[:2] == trunk[:2] and found[-2:] == trunk[-2:] and "loss" in found
    assert parts(name)["__main__"] == parts(TRUNK)["__main__"]


# What a file has from the trunk word for word.
COPIED = {
    "bupo.py": ["advantages", "loss"],
    "ppo.py": ["loss"],
    "variants/cispo.py": ["advantages", "main"],
    "variants/dapo.py": ["advantages", "loss"],
    "variants/gspo.py": ["advantages"],
}


@pytest.mark.parametrize("name, part", [(name, part) for name in COPIED for part in COPIED[name]])
def test_what_is_copied_is_copied_word_for_word(name, part):
    """A fix that reaches only one of two copies: from then on two algorithms differ by a bug."""
    assert parts(name)[part] == parts(TRUNK)[part]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_grades_by_the_reward_that_was_asked_for(name):
    """An option of all scripts that one of them forgets: its control run would be the real thing."""
    [call] = [node for node in nodes_of(name) if isinstance(node, ast.Call) and is_called(node, "grade_rollouts")]
    assert "args.reward" in [ast.unparse(argument) for argument in call.args]


def is_called(node, name):
    return isinstance(node.func, ast.Attribute) and node.func.attr == name


# How many of the trunk's lines of code a file does without.
LEFT_OUT = {
    "bupo.py": 7,
    "em.py": 88,
    "opo.py": 73,
    "ppo.py": 38,
    "variants/cispo.py": 10,
    "variants/dapo.py": 7,
    "variants/gspo.py": 8,
}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_fix_of_the_trunk_reaches_every_file(name):
    """A line that is mended in the trunk alone is one more line that this file has not. Mend it here, too; what a file
    leaves out on purpose changes its number above."""
    diff = list(difflib.unified_diff(code_lines(TRUNK), code_lines(name), n=0, lineterm=""))[2:]
    missing = [line for line in diff if line.startswith("-")]
    assert len(missing) == LEFT_OUT[name], "\n".join(missing)


@pytest.mark.parametrize("name", [*ALGORITHMS, *GROUND, *TASKS, *PLUMBING])
def test_no_identifier_carries_an_algorithm_name(name):
    """`grpo_loss` in one file and `opo_loss` in the next is a difference that means nothing."""
    algorithms = {algorithm.split("/")[-1].removesuffix(".py") for algorithm in ALGORITHMS}
    for token in tokens_of(name):
        if token.type == tokenize.NAME:
            words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", token.string)
            assert not {word.lower() for word in words} & algorithms, token.string


# Imports only go down -------------------------------------------------------------------------------------------------

UNDER_LESSONS = ("common.py", "bookkeeping.py", "tasks/", "plumbing/")
# File or folder -> how the paths begin of what it may import. A file that is not named here is a lesson.
UNDER = {
    "bookkeeping.py": ("common.py", "tasks/", "plumbing/"),
    "common.py": ("plumbing/",),  # what is sampled, scored and trained can be read without run folder and tasks
    "tasks": ("tasks/", "plumbing/errors.py", "plumbing/verifier.py"),
    "plumbing": ("plumbing/",),
    "plumbing/options.py": ("plumbing/", "tasks/"),  # --help names the built-in tasks
    "tests": ("tests/", *LESSONS, *UNDER_LESSONS),
    "benchmarks": ("benchmarks/", *LESSONS, *UNDER_LESSONS),
}
# Lessons that others may import, inside the function that needs them: the embedded model, the boundary layer, streams.
MEANT = {
    "sft.py": LESSONS,
    "analyze_entropy.py": ["bupo.py", "analyze_lens.py", "analyze_patching.py", "analyze_alignment.py"],
    "analyze_lens.py": ["analyze_alignment.py"],
}


def importable():
    """Name of a module -> its file. Tests and benchmarks call their own without the folder, too."""
    found = {}
    for name in [*HOUSE, *AROUND]:
        dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        found[dotted] = name
        if name in AROUND:
            found.setdefault(dotted.split(".")[1], name)
    return found


MODULES = importable()


def imports(name):
    """Files of this project that a file imports, each with the statement that does it."""
    found = []
    for node in nodes_of(name):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                modules.append(full if full in MODULES else node.module)
        found += [(MODULES[module], node) for module in modules if module in MODULES]
    return found


@pytest.mark.parametrize("name", [*HOUSE, *AROUND])
def test_imports_only_go_down(name):
    """A floor that knows what stands on it cannot be read alone, and neither of the two can be changed alone."""
    allowed = UNDER.get(name) or UNDER.get(name.split("/")[0]) or UNDER_LESSONS
    for imported, statement in imports(name):
        if not imported.startswith(allowed):
            assert name in MEANT.get(imported, ()), f"{name} imports {imported}"
            assert statement not in tree(name).body, f"{name} imports {imported} at its top"


@pytest.mark.parametrize("name", [*TASKS, "plumbing/verifier.py", "plumbing/errors.py"])
def test_problems_and_verdicts_need_no_torch(name):
    """Grading workers that import torch cost seconds and 400 MB each."""
    for node in tree(name).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert "torch" not in ast.unparse(node)


def test_the_ground_floor_asks_for_no_algorithm():
    """Shared code that asks which algorithm runs is an algorithm spread over two files."""
    for name in GROUND:
        assert not re.search(r"\balgorithm(==|!=|in\b)", "\n".join(code_lines(name)))


def names_taken(name, module):
    """What a file takes from a module: `x` of `module.x` and of `from module import x`."""
    found = set()
    for node in nodes_of(name):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module:
            found.add(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module == module:
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("module", ["common", "bookkeeping"])
def test_a_name_is_taken_from_where_it_lives(module):
    """A name that is passed on has two addresses, and who looks it up reads one file too many."""
    defined = set(parts(f"{module}.py"))
    passed_on = {name: names_taken(name, module) - defined for name in [*HOUSE, *AROUND]}
    assert {name: names for name, names in passed_on.items() if names} == {}


# A task's own business ------------------------------------------------------------------------------------------------


def defaults_in(name):
    """The nodes inside `option(...)`, `dict(...)`, `add(...)`, where a default may stand."""
    found = set()
    for node in nodes_of(name):
        if isinstance(node, ast.Call) and re.search(r"\b(option|dict|add|add_argument)$", ast.unparse(node.func)):
            found.update(ast.walk(node))
    return found


@functools.cache
def fields_of_tasks():
    """Names of what a problem of any built-in task has, and other problems have not."""
    fields = set()
    for name, task in tasks.built_in().items():
        [problem] = task.problems(name, "test", 1)
        fields.update(problem.record())
    return fields


@pytest.mark.parametrize("name", [*LESSONS, *GROUND, *PLUMBING])
def test_what_a_task_needs_is_its_own_business(name):
    """Countdown's numbers once stood in four files, and those of a second task like it would have stood there, too."""
    assert fields_of_tasks() == {"numbers", "target"}
    defaults = defaults_in(name)
    mentioned = []
    for node in nodes_of(name):
        if isinstance(node, ast.Attribute) and node.attr in fields_of_tasks():
            mentioned.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in defaults:
            if node.value in fields_of_tasks() or node.value in tasks.built_in():
                mentioned.append(f"line {node.lineno}: {node.value!r}")
    assert mentioned == []


# What must never run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOUSE)
def test_nothing_runs_foreign_code(name):
    """What a model writes, or a checkpoint holds, is data: a reward that calls `eval` runs the policy's programs."""
    for node in nodes_of(name):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "exec" and name == "plumbing/start.py":
                continue  # it runs the statements of the very script that Python was started with
            assert called not in ("eval", "exec", "pickle.load", "pickle.loads"), ast.unparse(node)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called != "torch.load" or options.get("weights_only") == "True", ast.unparse(node)
            if re.fullmatch("Auto[A-Za-z]+[.]from_pretrained", called):  # left out, the user is asked and may say yes
                assert options.get("trust_remote_code") == "False", ast.unparse(node)
