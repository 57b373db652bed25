"""docs/inside.ipynb: its cells run, in their order, and what they print is what was kept."""

import ast
import base64
import json

import pytest
from helpers import ROOT

NOTEBOOK = json.loads((ROOT / "docs/inside.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def kept(cell):
    """What a cell has printed when the notebook was made."""
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def labels(printed):
    """The first words of its lines: numbers and answers are another model's."""
    return list(dict.fromkeys(line.split(":")[0].split(" ")[0] for line in printed.splitlines()))


def test_every_cell_runs_and_prints_what_it_printed(run_folder, capsys, monkeypatch):
    """A notebook that no longer fits the code fails in front of thirty students."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(ROOT)
    names = {"__name__": "__main__"}
    for cell in CODE:
        source = "".join(cell["source"]).replace('"runs/bupo"', repr(str(run_folder)))
        exec(compile(source, "docs/inside.ipynb", "exec"), names)
        assert labels(capsys.readouterr().out) == labels(kept(cell)), source
    assert names["metrics"]["clip_share"] == 0
    assert abs((names["logps"] - names["rollouts"].logps).max()) < 1e-4
    assert names["gradient_norms"]()[names["k"] + 1 :] == [None] * (names["L"] - names["k"] - 1)


def test_outputs_are_kept_and_figures_are_pictures():
    """Who reads it in a browser runs nothing."""
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    pictures = 0
    for cell in CODE:
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            picture = output.get("data", {}).get("image/png")
            if picture:
                pictures += base64.b64decode(picture).startswith(b"\x89PNG")
    assert pictures == 2
    assert all(kept(cell) for cell in CODE if "print(" in "".join(cell["source"]))
    assert len(json.dumps(NOTEBOOK)) < 300_000


def test_it_defines_nothing_that_the_repository_has_not():
    """A second version of the loss in a notebook is the one that students copy."""
    defined = []
    for cell in CODE:
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
                defined.append(getattr(node, "name", "lambda"))
    assert defined == ["gradient_norms"]


@pytest.mark.parametrize("key, value", [("nbformat", 4), ("nbformat_minor", 5)])
def test_it_is_a_notebook(key, value):
    assert NOTEBOOK[key] == value
    assert all(cell["id"] and isinstance(cell["source"], list) for cell in NOTEBOOK["cells"])
