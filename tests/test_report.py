"""report.py: one page about a run. The browser's part is slow: it needs Chromium, see tests/browser.py, and plotly.

In the quick tests a line of script stands for plotly, so that the suite needs no more packages than the scripts.
"""

import base64
import gzip
import hashlib
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from browser import Browser
from helpers import ROOT, read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import report
from plumbing import pages
from plumbing.errors import UserError
from plumbing.models import load_model
from plumbing.tuned_lens import lens_folder, new_lens, save_lens

STAND_IN = 'window.Plotly = {react() { document.body.title = "<\\u00e9>"; }};'

HOSTILE = {
    "script": "<script>window.harmed = 1</script>",
    "end of the data": "</script><script>window.harmed = 2</script><!--",
    "image": '<img src="https://example.com/x.png" onerror="window.harmed = 3"><a href="javascript:window.harmed=4">',
    "terminal": "\x1b[31mred\x1b[2J\x1b]0;title\x07 NUL: \x00 right to left: \u202e321 \u2028 {{DATA}}",
    "long": "<b>x</b>" * 12_500,
    "nothing": "",
}


def read_page(path):
    """The data of a page, parsed as a browser does: up to the first end tag of their element."""
    text = Path(path).read_text(encoding="utf-8")
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def write_report(*words):
    """Run report.py on words of a command line -> the data of its page."""
    words = [str(word) for word in words]
    report.main(report.parse(words))
    return read_page(Path(words[0]) / "report.html")


@pytest.fixture
def without_plotly(monkeypatch):
    monkeypatch.setattr(pages, "plotly_source", lambda: STAND_IN)


@pytest.fixture
def run(run_folder, without_plotly):
    """A copy of a finished bupo run: 4 steps, the first two internal; 8 answers a step."""
    return Path(shutil.copytree(run_folder, "runs/bupo"))


@pytest.fixture(scope="module")
def page(run_folder, tmp_path_factory):
    """(run folder, data of its page): the run of the fixture `run`, reported once for all tests that only read."""
    folder = Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("report") / "bupo"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "plotly_source", lambda: STAND_IN)
        return folder, write_report(folder, "--problems", 4, "--maps", 2, "--answers", 16)


def models_of(folder):
    """(last, first) model of a run as transformers loads them, and the tokenizer."""
    start = json.loads((folder / "args.json").read_text())["model"]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in (folder, start)]
    return models, AutoTokenizer.from_pretrained(folder)


def logits_of(model, tokenizer, problem, completion, **settings):
    """The model's output at the positions that predict a completion, from the chat template on."""
    message = [{"role": "user", "content": problem}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        return model(ids, **settings), slice(len(prompt) - 1, len(prompt) + len(completion) - 1)


def ids_of(tokenizer, data, places):
    """Tokens from their places among a page's words: in the embedded tokenizer every text belongs to one token."""
    return [tokenizer.convert_tokens_to_ids(data["spelled"][place]) for place in places]


# What stands in the page ----------------------------------------------------------------------------------------------


def test_the_curves_are_those_of_the_log(page):
    """A page that shows other numbers than the log is worse than none."""
    folder, data = page
    [run] = data["runs"]
    logged = {}
    for record in read_jsonl(folder / "metrics.jsonl"):
        stages = {f"seconds.{stage}": value for stage, value in record.get("seconds_by_stage", {}).items()}
        for name, value in (record | stages).items():
            if type(value) in (int, float) and name != "step":
                logged.setdefault(name, []).append((record["step"], pytest.approx(value, rel=1e-5)))
    found = {name: list(zip(curve["steps"], curve["values"])) for name, curve in run["curves"].items()}
    assert found == logged
    assert run["internal"] == [[1, 2]] and run["finished"] and run["last_step"] == 4


def test_every_answer_is_in_the_page(page):
    folder, data = page
    columns = data["answers"]["columns"]
    logged = read_jsonl(folder / "completions.jsonl")
    assert data["answers"]["total"] == len(logged) == 32 and not data["notes"]
    for name in ("step", "text", "answer", "reward", "length", "finished"):
        assert columns[name] == [record[name] for record in logged]
    assert columns["advantage"] == pytest.approx([record["advantage"] for record in logged], rel=1e-4)
    for name in ("problem", "gold"):
        texts = [columns[name]["texts"][place] for place in columns[name]["places"]]
        assert texts == [record[name] for record in logged]


def test_the_numbers_of_tokens_are_those_of_the_two_models(page):
    """One position off, the wrong model or a forgotten prompt: the colours would still look plausible."""
    folder, data = page
    models, tokenizer = models_of(folder)
    logged = read_jsonl(folder / "completions.jsonl")
    looked_at = data["looked_at"]["answers"]
    assert len(looked_at) == data["looked_at"]["as_logged"] == 16
    for place, here in looked_at.items():
        record = logged[int(place)]
        ids = ids_of(tokenizer, data, here["tokens"])
        assert ids == tokenizer(record["text"])["input_ids"] + [tokenizer.eos_token_id] * record["finished"]
        for name, model in zip(("end", "start"), models):
            output, predicting = logits_of(model, tokenizer, record["problem"], ids)
            logps = output.logits[0, predicting].log_softmax(-1)
            expected = logps.gather(-1, torch.tensor(ids)[:, None])[:, 0]
            assert here[name]["logp"] == pytest.approx(expected.tolist(), abs=2e-4)
            assert here[name]["entropy"] == pytest.approx((-(logps.exp() * logps).sum(-1)).tolist(), abs=2e-4)


def test_whole_groups_are_looked_at_and_those_with_something_to_learn(page):
    """A single answer shows no advantage; a group whose answers were all right has none."""
    _, data = page
    columns = data["answers"]["columns"]
    places = sorted(int(place) for place in data["looked_at"]["answers"])
    groups = {}
    for place in places:
        key = columns["step"][place], columns["problem"]["places"][place]
        groups.setdefault(key, []).append(columns["reward"][place])
    assert [len(rewards) for rewards in groups.values()] == [4] * 4
    mixed_in_log = len({step for step, reward in zip(columns["step"], columns["reward"]) if reward not in (0, 1)})
    assert mixed_in_log == 0 and sum(len(set(rewards)) > 1 for rewards in groups.values()) >= 3


def test_before_and_after_are_greedy_answers_with_their_exact_kl(page):
    """Against a plain argmax loop and the sum over the vocabulary, in double precision."""
    folder, data = page
    models, tokenizer = models_of(folder)
    policies = dict(zip(("end", "start"), models))
    assert len(data["compared"]) == 4
    for row in data["compared"]:
        for name, model in policies.items():
            ids = ids_of(tokenizer, data, row[name]["tokens"])
            logps = {}
            for policy, own in policies.items():
                output, predicting = logits_of(own, tokenizer, row["problem"], ids)
                logps[policy] = output.logits[0, predicting].log_softmax(-1)
                favourites = [data["spelled"][place] for place in row[name][policy]["favourite"]]
                assert favourites == [tokenizer.decode([i]) for i in logps[policy].argmax(-1).tolist()]
                largest = logps[policy].exp().amax(-1).tolist()
                assert row[name][policy]["probability"] == pytest.approx(largest, abs=2e-4)
            assert logps[name].argmax(-1).tolist() == ids  # greedy
            assert row[name]["finished"] == (ids[-1] == tokenizer.eos_token_id)
            kl = (logps["end"].exp() * (logps["end"] - logps["start"])).sum(-1)
            assert row[name]["kl"] == pytest.approx(kl.tolist(), abs=2e-4)
            text = "".join(data["spelled"][place] for place in row[name]["tokens"])
            assert row[name]["right"] == (f"\\boxed{{{row['gold']}}}" in text)


def test_the_maps_are_the_lens_of_every_block(page):
    """transformers' own hidden states, times the unembedding, with and without the final norm."""
    folder, data = page
    models, tokenizer = models_of(folder)
    assert len(data["maps"]) == 2
    for shown in data["maps"]:
        ids = ids_of(tokenizer, data, shown["tokens"])
        for name, model in zip(("end", "start"), models):
            output, predicting = logits_of(model, tokenizer, shown["problem"], ids, output_hidden_states=True)
            stream = []
            hooked = model.model.layers[-1].register_forward_hook(lambda m, i, o: stream.append(o))
            logits_of(model, tokenizer, shown["problem"], ids)
            hooked.remove()
            last = stream[0][0] if isinstance(stream[0], tuple) else stream[0]
            raw = [*output.hidden_states[:-1], last]  # transformers' own last entry is normed
            for lens, see in (("raw", lambda states: states), ("normed", model.model.norm)):
                rows = shown["policies"][name][lens]
                expected = [see(states) @ model.lm_head.weight.T for states in raw] + [output.logits]
                assert len(rows) == len(expected) == 3 + 2
                for row, logits in zip(rows, expected):
                    probabilities, tokens = logits[0, predicting].softmax(-1).topk(5)
                    found = torch.tensor(row["probabilities"]).double()
                    torch.testing.assert_close(found, probabilities, atol=2e-4, rtol=0)
                    tops = [ids_of(tokenizer, data, places)[0] for places in row["tops"]]
                    assert tops == tokens[:, 0].tolist()


def saved_lenses(run):
    """A lens with maps of its own for the run's last model, and for its starting model -> {path: lens}."""
    start = json.loads((run / "args.json").read_text())["model"]
    lenses = {}
    for path in (str(run), start):
        model, _ = load_model(path)
        lenses[path] = new_lens(model)
        for parameter in lenses[path].parameters():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape))
        save_lens(lenses[path], lens_folder(path), model, {})
    return start, lenses


def test_the_tuned_lens_is_a_third_button_where_every_model_has_one(run):
    """The translator of the block below, the one of the other model, or none: the map would look as plausible."""
    start, lenses = saved_lenses(run)
    try:
        data = write_report(run, "--problems", 2, "--maps", 1, "--answers", 0)
        models, tokenizer = models_of(run)
        [shown] = data["maps"]
        ids = ids_of(tokenizer, data, shown["tokens"])
        for name, path, model in zip(("end", "start"), (str(run), start), models):
            assert list(shown["policies"][name]) == ["raw", "normed", "tuned"]
            output, predicting = logits_of(model, tokenizer, shown["problem"], ids, output_hidden_states=True)
            rows = shown["policies"][name]["tuned"]
            for k in (0, 1):
                x = output.hidden_states[k + 1][0, predicting]
                lens = lenses[path].double()
                translated = model.model.norm(x + x @ lens.weight[k].T + lens.bias[k])
                expected, _ = (translated @ model.lm_head.weight.T).softmax(-1).topk(5)
                found = torch.tensor(rows[k + 1]["probabilities"]).double()
                torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)
            assert rows[3] == shown["policies"][name]["normed"][3] == rows[4]
        shutil.rmtree(lens_folder(str(run)))
        data = write_report(run, "--problems", 2, "--maps", 1, "--answers", 0)
        assert list(data["maps"][0]["policies"]["end"]) == ["raw", "normed"]
        assert any("analyze_lens.py" in note for note in data["notes"])
    finally:
        shutil.rmtree(lens_folder(start))  # that model is shared by all tests


def test_every_number_and_every_option_is_explained(page):
    """A number without a definition is believed or not, but never understood."""
    _, data = page
    [run] = data["runs"]
    names = {name.split(".")[0] for name in run["curves"]} | set(run["options"])
    assert names - set(data["definitions"]) <= {"script"}
    assert run["versions"]["torch"] == torch.__version__ and "commit" in run["versions"]


def test_the_same_run_gives_the_same_page(run):
    """What changes from one call to the next cannot be compared, and is no record of anything."""
    write_report(run, "--problems", 2)
    first = (run / "report.html").read_bytes()
    write_report(run, "--problems", 2)
    assert (run / "report.html").read_bytes() == first


# A large log ----------------------------------------------------------------------------------------------------------


def test_a_large_log_is_thinned_in_whole_groups_and_the_page_says_so(run, monkeypatch):
    """A page of 300 MB opens in no browser; half a group would show advantages that do not add up."""
    data = write_report(run, "--completions", 13, "--answers", 0, "--problems", 0)
    columns = data["answers"]["columns"]
    assert columns["step"] == [1] * 4 + [2] * 4 + [3] * 4 and data["answers"]["total"] == 32
    assert any("12 of 32 answers" in note for note in data["notes"])
    monkeypatch.setattr(report, "MOST_CHARACTERS", 100)
    data = write_report(run, "--answers", 0, "--problems", 0)
    assert 4 <= len(data["answers"]["columns"]["text"]) < 32


def test_a_long_answer_loses_its_middle():
    text = report.shortened("a" * 60_000 + "b" * 40_000)
    assert len(text) < report.LONGEST_TEXT + 60 and text[0] == "a" and text[-1] == "b" and "80,000" in text
    assert report.shortened("a" * report.LONGEST_TEXT) == "a" * report.LONGEST_TEXT


# What is not as it should be ------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_shown_as_far_as_it_goes(run):
    """The page is wanted most while a run is still going on. Its last model is that of the newest whole checkpoint."""
    (run / "trainer_state.json").unlink()
    with open(run / "completions.jsonl", "a") as file:
        file.write('{"step": 5, "text": "cut o')
    data = write_report(run, "--problems", 2)
    assert not data["runs"][0]["finished"]
    notes = " ".join(data["notes"])
    assert "unfinished" in notes and "checkpoint-3" in notes and "1 lines hold no answer" in notes
    assert data["compared"] and len(data["answers"]["columns"]["text"]) == 32


@pytest.mark.parametrize("content", [None, "", "[]\n{}\n"])
def test_a_run_without_answers_gives_a_page_without_that_part(content, run):
    (run / "completions.jsonl").unlink()
    if content is not None:
        (run / "completions.jsonl").write_text(content)
    data = write_report(run, "--problems", 0)
    assert data["answers"] is None and "looked_at" not in data
    assert any("no completions.jsonl" in note for note in data["notes"])


def test_runs_on_different_data_are_marked(run):
    """Two curves of accuracy in one panel are compared, whatever they are accuracies of."""
    other = Path(shutil.copytree(run, "runs/other"))
    same = Path(shutil.copytree(run, "runs/same"))
    args = json.loads((other / "args.json").read_text())
    (other / "args.json").write_text(json.dumps(args | dict(data="words.jsonl")))
    data = write_report(run, other, same, "--answers", 0, "--problems", 0)
    assert [shown["label"] for shown in data["runs"]] == ["bupo", "other", "same"]
    [note] = [note for note in data["notes"] if "Not to be compared" in note]
    assert "other has --data 'words.jsonl'" in note


def test_models_that_are_gone_leave_a_note(run):
    """The starting model of a run is often on another disk by then. The rest of the page needs only one of the two."""
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(args | dict(model="./gone")))
    data = write_report(run, "--problems", 2)
    assert any("starting model cannot be loaded" in note for note in data["notes"])
    assert all("start" not in here for here in data["looked_at"]["answers"].values())
    assert all("start" not in row and row["end"]["kl"] == [] for row in data["compared"])
    assert list(data["maps"][0]["policies"]) == ["end"]
    (run / "model.safetensors").unlink()
    data = write_report(run)
    assert "compared" not in data and data["answers"] and data["runs"][0]["curves"]


def test_no_held_out_problems_leave_a_note(run):
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(args | dict(eval_data="")))
    data = write_report(run)
    assert "compared" not in data and data["looked_at"]["answers"]
    assert any("has no --eval_data" in note for note in data["notes"])


@pytest.mark.parametrize(
    "words, expected",
    [
        (["missing"], "missing: no run folder"),
        (["."], "no run folder"),
        (["runs/bupo/checkpoint-1"], "no run folder"),
        (["runs/bupo", "runs/bupo"], "listed twice"),
        (["runs/bupo", "--answers", "-1"], "--answers -1: must be 0 or more"),
        (["runs/bupo", "--device", "nowhere"], "--device nowhere"),
        (["a", "b", "c", "d", "e", "f", "g"], "7 runs: at most 6"),
        (["runs/broken"], "runs/broken/args.json: cannot be read"),
    ],
)
def test_a_mistake_ends_with_one_line(words, expected, run):
    Path("runs/broken").mkdir()
    Path("runs/broken/args.json").write_text("{")
    with pytest.raises(UserError, match=re.escape(expected)):
        report.main(report.parse(words))


def test_the_reference_lists_the_options_with_their_defaults():
    section = (ROOT / "docs/reference.md").read_text().split("## The report")[1].split("\n## ")[0]
    listed = dict(re.findall(r"^\| `--(\w+)` \| `(\d+)` \|", section, re.MULTILINE))
    args = vars(report.parse(["run"]))
    assert {name: str(value) for name, value in args.items() if name not in (*report.SHARED, "runs")} == listed
    assert all(f"`--{name}`" in section for name in report.SHARED)


def test_a_missing_package_is_named_with_its_remedy(run_folder, monkeypatch):
    """Before any model is loaded: who waits for minutes and is then told to install something is angry."""
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setattr(report, "load_model", None)
    with pytest.raises(UserError, match="plotly is missing.*pip install -r requirements-report.txt"):
        report.main(report.parse([str(run_folder)]))
    assert "plotly" in (ROOT / "requirements-report.txt").read_text()


# What a model wrote is text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_an_answer_cannot_leave_its_place(name, run):
    """`</script>` in an answer ends the data, and what follows it runs."""
    record = read_jsonl(run / "completions.jsonl")[0]
    record |= dict(text=HOSTILE[name], answer=HOSTILE[name][:99], problem="<b>")
    write_jsonl(run / "completions.jsonl", [record])
    data = write_report(run, "--answers", 1, "--problems", 0)
    assert data["answers"]["columns"]["text"] == [report.shortened(HOSTILE[name])]
    text = (run / "report.html").read_text(encoding="utf-8")
    [line] = [line for line in text.split("\n") if 'id="data"' in line]
    assert line.count("<") == 2 and "\0" not in text
    assert len(re.findall("<script", text)) == 3


def test_half_a_character_is_no_reason_to_fail(run):
    """JSON can hold one, UTF-8 cannot."""
    with open(run / "completions.jsonl", "a") as file:
        file.write(json.dumps(read_jsonl(run / "completions.jsonl")[0] | dict(step=9, text="\ud800x")) + "\n")
    data = write_report(run, "--answers", 99, "--problems", 0)
    assert data["answers"]["columns"]["text"][-1] == "?x"


def scripts_of(text):
    return re.findall(r"<script(?: [^>]*)?>(.*?)</script>", text, re.DOTALL)


def test_the_policy_lets_the_page_s_own_scripts_run_and_nothing_else(run):
    """A hash that does not fit makes a dead page; 'unsafe-inline' would let an answer's handler run."""
    write_report(run, "--answers", 0, "--problems", 0)
    text = (run / "report.html").read_text(encoding="utf-8")
    [policy] = re.findall('http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    library, _, script = scripts_of(text)
    unpacked = gzip.decompress(base64.b64decode(library)).decode()
    assert unpacked == STAND_IN
    hashes = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in (script, unpacked)]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].split() == [f"'sha256-{found}'" for found in hashes]


def test_the_page_sets_text_as_text_and_fetches_nothing():
    """One innerHTML is enough. Links lead to places in the page only."""
    script = (pages.TEMPLATE / "page.js").read_text(encoding="utf-8")
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "fetch("):
        assert forbidden not in script
    for name in ("page.html", "page.css", "page.js"):
        text = (pages.TEMPLATE / name).read_text(encoding="utf-8")
        assert "http:" not in text and "https:" not in text and "url(" not in text
    assert not re.search(r'\b(src|href)="(?!data:,)', (pages.TEMPLATE / "page.html").read_text(encoding="utf-8"))


# In a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def real_page(run_folder, tmp_path_factory):
    """(run folder, data of its page), with plotly: two runs, the first with tuned lenses, the second on other data and
    with one warning."""
    folder = tmp_path_factory.mktemp("browser")
    first = Path(shutil.copytree(run_folder, folder / "bupo"))
    other = Path(shutil.copytree(run_folder, folder / "other <b>"))
    args = json.loads((other / "args.json").read_text())
    args["model"] = str(shutil.copytree(args["model"], folder / "start"))
    (first / "args.json").write_text(json.dumps(args))
    saved_lenses(first)
    (other / "args.json").write_text(json.dumps(args | dict(data="<i>words</i>", learning_rate=0.5)))
    records = read_jsonl(other / "metrics.jsonl")
    records[-1]["entropy"] = 1e-5
    write_jsonl(other / "metrics.jsonl", records)
    return first, write_report(first, other, "--problems", 8, "--maps", 2, "--answers", 16)


def is_quiet(browser, path):
    """No complaint, and no request but for the page itself."""
    assert browser.errors == []
    assert set(browser.requests) == {Path(path).resolve().as_uri()}


@pytest.fixture
def opened(browser, real_page):
    """The page in a fresh tab; whatever a test does there, it must stay quiet."""
    folder, data = real_page
    browser.requests.clear()
    browser.errors.clear()
    browser.open(folder / "report.html")
    browser.value("document.documentElement.style.scrollBehavior = 'auto'")
    yield browser
    is_quiet(browser, folder / "report.html")


def shown_answers(browser):
    """Places in the log of the answers that are shown."""
    cards = "[...document.querySelectorAll('#answers-list .card')]"
    return browser.value(f"{cards}.map(card => Number(card.dataset.row))")


@pytest.mark.slow
def test_browser_curves_show_the_log_s_numbers_under_the_cursor(opened, real_page):
    folder, _ = real_page
    logged = {record["step"]: record for record in read_jsonl(folder / "metrics.jsonl") if "reward" in record}
    opened.value("document.querySelector('#panel-0').scrollIntoView({block: 'center'})")
    box = opened.value(
        "(() => { const p = document.querySelector('#panel-0'), a = p._fullLayout, r = p.getBoundingClientRect();"
        "return [r.x + a.margin.l + a.xaxis.l2p(3), r.y + a._size.t + 40]; })()"
    )
    opened.move(box[0] - 3, box[1])
    opened.move(*box)
    opened.wait_for("document.querySelectorAll('#panel-0 .hoverlayer text').length > 1")
    texts = opened.texts("#panel-0 .hoverlayer text")
    assert texts[0] == "3"
    [found] = [text for text in texts if text.startswith("accuracy, bupo: ")]
    assert float(found.split(": ")[1]) == pytest.approx(logged[3]["accuracy"], rel=1e-3)
    assert opened.value("document.querySelectorAll('#panel-0 .layer-below path').length") == 2  # a phase of each run


@pytest.mark.slow
def test_browser_every_metric_can_be_drawn_on_both_scales(opened, real_page):
    folder, data = real_page
    names = opened.value("[...document.querySelector('#metric').options].map(o => o.value)")
    assert set(names) == set(data["runs"][0]["curves"])
    for name in names:
        opened.choose("#metric", name)
        drawn = opened.value("document.querySelector('#metric-plot').data.map(t => [t.x, t.y])")
        curve = data["runs"][0]["curves"][name]
        assert drawn[0] == [curve["steps"], curve["values"]]
    opened.choose("#scale", "log")
    assert opened.value("document.querySelector('#metric-plot').layout.yaxis.type") == "log"


@pytest.mark.slow
def test_browser_table_of_evaluations_is_the_log(opened, real_page):
    folder, _ = real_page
    opened.click("#curves summary")
    head = opened.texts("#evaluations thead th")
    evaluations = [record for record in read_jsonl(folder / "metrics.jsonl") if "eval_accuracy" in record]
    rows = opened.rows("#evaluations")
    assert len(rows) == 2 * len(evaluations)
    for row, record in zip(rows, evaluations):
        shown = dict(zip(head, row))
        assert shown["run"] == "bupo" and int(shown["step"]) == record["step"]
        for name in ("eval_accuracy", "eval_greedy_accuracy", "eval_entropy", "kl_to_start"):
            assert float(shown[name]) == pytest.approx(record[name], rel=1e-3)


FILTERS = {
    "step-from": (3, lambda record: record["step"] >= 3),
    "step-to": (2, lambda record: record["step"] <= 2),
    "length-from": (5, lambda record: record["length"] >= 5),
    "length-to": (5, lambda record: record["length"] <= 5),
    "verdict": ("right", lambda record: record["reward"] == 1),
    "search": ("SO \\boxed{7", lambda record: "so \\boxed{7" in record["text"]),
}


@pytest.mark.slow
def test_browser_filters_find_what_the_log_holds(opened, real_page):
    folder, _ = real_page
    logged = read_jsonl(folder / "completions.jsonl")
    assert opened.texts("#answers-count")[0].startswith("16 answers of 32")
    opened.click("#only-values")
    for name, (value, keeps) in FILTERS.items():
        opened.choose(f"#{name}", value)
        expected = [place for place, record in enumerate(logged) if keeps(record)]
        assert 0 < len(expected) < 32
        assert opened.texts("#answers-count")[0].startswith(f"{len(expected)} answer")
        assert shown_answers(opened) == expected[:10]
        opened.click("#reset")
        assert opened.texts("#answers-count")[0].startswith("32 answers of 32")
    for value, size in (("wrong", sum(record["reward"] == 0 for record in logged)), ("partly", 0), ("cut", 0)):
        opened.choose("#verdict", value)
        assert opened.texts("#answers-count")[0].startswith(f"{size} answer")


@pytest.mark.slow
@pytest.mark.parametrize("order, name, sign", [("advantage-down", "advantage", -1), ("advantage-up", "advantage", 1),
                                               ("length-down", "length", -1), ("length-up", "length", 1)])  # fmt: skip
def test_browser_answers_are_sorted_and_paged(order, name, sign, opened, real_page):
    folder, data = real_page
    column = data["answers"]["columns"][name]
    opened.click("#only-values")
    opened.choose("#order", order)
    expected = sorted(range(32), key=lambda place: (sign * column[place], place))
    seen = shown_answers(opened)
    for _ in range(3):
        opened.click("#answers-on")
        seen += shown_answers(opened)
    assert seen == expected
    assert opened.value("document.querySelector('#answers-on').disabled")
    opened.click("#answers-back")
    assert opened.texts("#answers-page") == ["page 3 of 4"]


@pytest.mark.slow
def test_browser_a_card_says_what_the_log_says(opened, real_page):
    folder, _ = real_page
    logged = read_jsonl(folder / "completions.jsonl")
    for place in shown_answers(opened):
        record = logged[place]
        card = f"#answers-list .card[data-row='{place}']"
        assert opened.texts(f"{card} .problem") == [record["problem"]]
        assert "".join(opened.texts(f"{card} .text span")).removesuffix("<|end|>") == record["text"]
        assert opened.texts(f"{card} .gold") == [record["gold"]]
        assert opened.texts(f"{card} .extracted") == [record["answer"] or "nothing"]
        top = opened.texts(f"{card} .top")[0]
        assert f"step {record['step']}" in top and f"{record['length']} token" in top
        assert ("✓ right" in top) == (record["reward"] == 1)
        [advantage] = opened.texts(f"{card} .top span:nth-child(3)")
        assert float(advantage.removeprefix("advantage ")) == pytest.approx(record["advantage"], abs=6e-3)


@pytest.mark.slow
def test_browser_its_group_shows_the_whole_group(opened, real_page):
    folder, _ = real_page
    logged = read_jsonl(folder / "completions.jsonl")
    first = shown_answers(opened)[0]
    opened.click("#answers-list .card button")
    opened.wait_for("document.querySelectorAll('#answers-list .card').length === 4")
    keys = {(logged[place]["step"], logged[place]["problem"]) for place in shown_answers(opened)}
    assert keys == {(logged[first]["step"], logged[first]["problem"])}


@pytest.mark.slow
def test_browser_tokens_change_colour_and_tell_their_numbers(opened, real_page):
    """The colour of every token follows the number, and the number is under the cursor."""
    _, data = real_page
    place = str(shown_answers(opened)[0])
    here = data["looked_at"]["answers"][place]
    colours = {}
    for colour in ("logp", "entropy", "change", "advantage"):
        opened.choose("#colour", colour)
        for policy in ("end", "start"):
            opened.choose("#policy", policy)
            spans = f"[...document.querySelectorAll(\"#answers-list .card[data-row='{place}'] .text span\")]"
            found = opened.value(f"{spans}.map(span => span.style.backgroundColor)")
            colours[colour, policy] = tuple(found)
            values = here[policy].get(colour)
            if values is not None:
                shades = [float(re.findall(r"[\d.]+\)$", shade)[0][:-1]) if shade else 0 for shade in found]
                order = sorted(range(len(values)), key=lambda t: abs(values[t]))
                assert [shades[t] for t in order] == pytest.approx(sorted(shades), abs=1e-3)
    assert len({colours[colour, "end"] for colour in ("logp", "entropy", "change", "advantage")}) == 4
    assert colours["logp", "end"] != colours["logp", "start"]
    opened.point_at(f"#answers-list .card[data-row='{place}'] .text span")
    tip = opened.texts("#tip")[0]
    for name, text in (("end", "last model"), ("start", "starting model")):
        [found] = re.findall(text + r": log-prob (\S+), p (\S+)%, entropy (\S+)", tip)
        assert float(found[0]) == pytest.approx(here[name]["logp"][0], abs=1e-3)
        assert float(found[2]) == pytest.approx(here[name]["entropy"][0], abs=1e-3)


@pytest.mark.slow
def test_browser_before_and_after_agree_with_the_data(opened, real_page):
    _, data = real_page
    pairs = [(row["start"], row["end"]) for row in data["compared"]]
    changed = 0
    positions = 0
    for start, end in pairs:
        longest = max(len(start["tokens"]), len(end["tokens"]))
        positions += longest
        changed += sum(start["tokens"][t : t + 1] != end["tokens"][t : t + 1] for t in range(longest))
    boxes = dict(zip(opened.texts("#compare-figures .figure > span:first-child"), opened.texts("#compare-figures b")))
    assert boxes["changed positions"] == f"{100 * changed / positions:.1f}%"
    right = [100 * sum(pair[side]["right"] for pair in pairs) / len(pairs) for side in (0, 1)]
    assert boxes["greedy accuracy here"] == f"{right[0]:.1f}% → {right[1]:.1f}%"
    largest = [float(text) for text in opened.texts("#largest tbody td:first-child")]
    expected = sorted((value for _, end in pairs for value in end["kl"]), reverse=True)
    assert largest == pytest.approx(expected[: len(largest)], rel=1e-2) and len(largest) == 12
    for value, keeps in (
        ("gained", lambda start, end: end["right"] and not start["right"]),
        ("lost", lambda start, end: start["right"] and not end["right"]),
        ("changed", lambda start, end: start["tokens"] != end["tokens"]),
        ("", lambda start, end: True),
    ):
        opened.choose("#compare-filter", value)
        size = sum(keeps(start, end) for start, end in pairs)
        assert opened.texts("#compare-count")[0].startswith(f"{size} of 8 ")
    opened.choose("#compare-order", "")
    rows = opened.value("[...document.querySelectorAll('#compare-list .card')].map(c => Number(c.dataset.row))")
    assert rows == [0, 1, 2, 3, 4, 5]
    opened.choose("#compare-order", "kl")
    first = opened.value("Number(document.querySelector('#compare-list .card').dataset.row)")
    assert max(pairs[first][1]["kl"]) == max(expected)
    opened.choose("#compare-colour", "changed")
    opened.choose("#compare-order", "changed")
    opened.click("#compare-on")
    assert opened.texts("#compare-page") == ["page 2 of 2"]
    opened.point_at("#compare-list .end .text span")
    assert "KL(end || start)" in opened.texts("#tip")[0] and "likeliest before" in opened.texts("#tip")[0]


@pytest.mark.slow
@pytest.mark.parametrize("lens", ["raw", "normed", "tuned"])
@pytest.mark.parametrize("policy", ["end", "start"])
def test_browser_a_cell_of_the_map_tells_its_five_likeliest_tokens(lens, policy, opened, real_page):
    _, data = real_page
    opened.choose("#map-answer", "1")
    opened.choose("#map-policy", policy)
    opened.click(f"#map-lens button[value={lens}]")
    rows = data["maps"][1]["policies"][policy][lens]
    names = opened.texts("#map tbody th")
    assert names == ["whole policy", "block 2", "block 1", "block 0", "embedding"]
    for depth, row in enumerate(reversed(rows), 1):
        opened.point_at(f"#map tbody tr:nth-child({depth}) td:nth-child(3)")
        title = opened.texts("#map-cell p")[0]
        assert title.startswith(f"{names[depth - 1]}, {lens} lens")
        assert opened.value("document.querySelector('#map-cell a').hash") == f"#def-{lens}-lens"
        assert float(re.findall(r"entropy (\S+) nats", title)[0]) == pytest.approx(row["entropy"][1], abs=1e-3)
        shown = [float(text.removesuffix("%")) for text in opened.texts("#map-cell td:nth-child(2)")]
        assert shown == pytest.approx([100 * value for value in row["probabilities"][1]], abs=0.051)
        tokens = [data["spelled"][place].replace(" ", "␣") for place in row["tops"][1]]
        assert opened.texts("#map-cell td:first-child") == tokens
    opened.press("ArrowUp")
    opened.value("document.querySelector('#map').focus()")
    opened.press("ArrowUp")
    assert opened.texts("#map-cell p")[0].startswith("block 0")


@pytest.mark.slow
def test_browser_the_run_s_options_and_warnings_are_there(opened, real_page):
    folder, _ = real_page
    args = json.loads((folder / "args.json").read_text())
    shown = {row[0]: row[1:] for row in opened.rows("#options")}
    assert set(shown) == set(args) - {"versions"}
    assert shown["learning_rate"] == [str(args["learning_rate"]), "0.5"]
    assert shown["data"][1] == "<i>words</i>"
    opened.click("#only-different")
    assert opened.texts("#options tbody th") == ["data", "learning_rate"]
    assert args["versions"]["commit"] in opened.texts("#versions td")
    [fault] = opened.texts("#faults p")
    assert fault.startswith("other <b>: entropy collapse, in 1 step, first in step 4")
    assert any("Not to be compared" in note for note in opened.texts("#notes p"))
    opened.click("#curves-legend a, #figures a")
    opened.wait_for("location.hash.startsWith('#def-')")
    assert opened.value("document.querySelector(location.hash) !== null")
    assert len(opened.texts("#nav a")) == 6


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_browser_the_page_fits_phone_and_screen_light_and_dark(width, dark, browser, real_page):
    """Nothing makes the page wider than the screen, and its colours are those that the reader's system asks for."""
    folder, _ = real_page
    browser.errors.clear()
    browser.requests.clear()
    browser.open(folder / "report.html", width=width, dark=dark)
    assert browser.value("document.documentElement.scrollWidth") <= width
    red = browser.value("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    assert (red < 60) == dark
    for selector in ("input[type=number]", "select", "button"):
        heights = browser.value(f"[...document.querySelectorAll('.controls {selector}')].map(e => e.offsetHeight)")
        assert min(height for height in heights if height) >= 36  # a finger must hit it
    is_quiet(browser, folder / "report.html")


@pytest.mark.slow
def test_browser_a_hostile_answer_does_nothing(browser, run_folder, tmp_path):
    """It is shown as it stands, control characters as signs, and neither runs, nor asks, nor moves anything."""
    folder = Path(shutil.copytree(run_folder, tmp_path / "hostile"))
    record = read_jsonl(folder / "completions.jsonl")[0]
    records = [record | dict(text=text, answer=text[:50], gold=text[:50]) for text in HOSTILE.values()]
    write_jsonl(folder / "completions.jsonl", [record | dict(step=i) for i, record in enumerate(records)])
    write_report(folder, "--answers", 6, "--problems", 2)
    browser.requests.clear()
    browser.errors.clear()
    browser.open(folder / "report.html", width=390)
    browser.choose("#only-values", False)
    texts = browser.texts("#answers-list .card")
    inside = "[...document.querySelectorAll('#answers-list .text *')]"
    assert browser.value(f"{inside}.every(element => ['SPAN', 'I'].includes(element.tagName))")
    assert HOSTILE["script"] in texts[0] and HOSTILE["end of the data"] in texts[1] and HOSTILE["image"] in texts[2]
    assert "␛[31mred" in texts[3] and "NUL: ␀" in texts[3] and "[U+202E]" in texts[3] and "{{DATA}}" in texts[3]
    assert len(texts[4]) < 22_000 and "80,000 characters left out" in texts[4]
    assert browser.value("document.documentElement.scrollWidth") <= 390
    browser.choose("#search", "<script>")
    assert len(browser.texts("#answers-list .card")) == 2
    assert browser.value("window.harmed") is None
    is_quiet(browser, folder / "report.html")


@pytest.mark.slow
def test_browser_fifty_thousand_answers_open_in_seconds(browser, run_folder, tmp_path):
    """60 seconds to write, 30 MB and 3 seconds to open, on two cores that do nothing else."""
    folder = Path(shutil.copytree(run_folder, tmp_path / "large"))
    record = read_jsonl(folder / "completions.jsonl")[0]
    with open(folder / "completions.jsonl", "w", encoding="utf-8") as file:
        for i in range(50_000):
            text = f"{i} so " + "many words and 12 + 3 = 15; " * (i % 60)
            file.write(json.dumps(record | dict(step=1 + i // 500, problem=f"{i // 10}+1=", text=text)) + "\n")
    started = time.perf_counter()
    data = write_report(folder)
    assert time.perf_counter() - started < 60
    assert (folder / "report.html").stat().st_size < 30e6
    held = len(data["answers"]["columns"]["text"])
    assert 10_000 < held < 50_000 and any(f"{held:,} of 50,000 answers" in note for note in data["notes"])
    browser.requests.clear()
    assert min(browser.open(folder / "report.html") for _ in range(3)) < 3
    assert any(f"{held:,} of 50,000" in note for note in browser.texts("#notes p"))
    browser.choose("#only-values", False)
    browser.choose("#search", "49990 so")
    assert time.perf_counter() - started < 120
    is_quiet(browser, folder / "report.html")
