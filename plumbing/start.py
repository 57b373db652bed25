"""The first second of a script: --help answers before torch is loaded, Ctrl-C ends in one line meanwhile, and torch's
threads are told to sleep while they wait.

Every script imports this file first. Loading torch and transformers takes seconds, and for its help a script needs
neither: its options depend on its constants, on its class Args and on functions that no library is called in.
"""

import ast
import os
import signal
import sys
from pathlib import Path

from plumbing.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

# Modules of this project that load quickly.
QUICK = (
    "plumbing.errors",
    "plumbing.figures",
    "plumbing.files",
    "plumbing.options",
    "plumbing.pages",
    "plumbing.processes",
    "plumbing.runs",
    "plumbing.samples",
    "plumbing.verifier",
    "tasks",
)


def running_script():
    """The file of this project that Python was started with; None where that is another program, pytest say."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None or Path(file).resolve().parent not in (ROOT, ROOT / "variants"):
        return None
    return Path(file)


def is_quick(node):
    """True for the statements of a script that its options may depend on."""
    if isinstance(node, ast.ImportFrom) and node.module == "plumbing":
        return all(f"plumbing.{alias.name}".startswith(QUICK) for alias in node.names)
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        in_library = module.split(".")[0] in sys.stdlib_module_names
        return in_library or module.startswith(QUICK)
    if isinstance(node, ast.ClassDef):
        return node.name == "Args"
    return isinstance(node, (ast.Assign, ast.FunctionDef))


def answer_help(script):
    """Print the help of a script and exit. Where that takes more than its quick statements, return: then the script
    answers itself, seconds later."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    names = dict(__name__="__main__", __doc__=ast.get_docstring(tree))
    tree.body = [node for node in tree.body if is_quick(node)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    try:
        exec(compile(tree, str(script), "exec"), names)
        if "Args" in names:
            names["parse"](names["Args"], names["EMBEDDED"])
        else:
            names["parse"]()
    except (NameError, AttributeError, UserError):
        return


def end_quietly(number, frame):
    """Ctrl-C while libraries load: one line, where each of them would add a traceback."""
    print("interrupted", file=sys.stderr)
    os._exit(128 + number)


def wait_asleep():
    """Threads of torch that have nothing to do shall sleep, not spin: on a busy machine, one that spins takes the core
    from the one it waits for. OpenMP reads this once, while torch is imported; whoever has set it keeps it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if running_script():
    wait_asleep()
    signal.signal(signal.SIGINT, end_quietly)  # until `plumbing.errors.one_line_errors` takes over
    if {"-h", "--help"} & set(sys.argv[1:]):
        answer_help(running_script())
    if sys.stderr.isatty():
        print("loading torch and transformers: some seconds", file=sys.stderr)
