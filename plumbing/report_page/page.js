"use strict";
// The page of report.py. Data come from the element #data. What a model wrote is set as text, never as HTML, and a
// label that goes to plotly, which reads a few tags, is escaped first. Nothing is fetched.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const isDark = matchMedia("(prefers-color-scheme: dark)");

// Small things --------------------------------------------------------------------------------------------------------

/** An element with properties and children; children that are text stay text. */
function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A text without characters that move, hide or turn round what stands beside them. */
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g, (c) => {
    const code = c.charCodeAt(0);
    return code < 32 ? String.fromCharCode(0x2400 + code) : `[U+${code.toString(16).padStart(4, "0").toUpperCase()}]`;
  });
}

/** A token as one line: its white space can be seen. */
function inline(text) {
  return visible(text).replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/ /g, "\u2423");
}

const escaped = (text) => visible(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function number(value, digits = 4) {
  if (value === null || value === undefined) return "none";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

/** Three digits, zeros among them. */
const figures = (value) => (value === 0 ? "0" : Math.abs(value) >= 1000 ? number(value) : value.toPrecision(3));
const signed = (value, digits = 3) => (value > 0 ? "+" : "") + number(value, digits);
const anchor = (name) => `def-${name.replace(/[^\w.-]+/g, "-")}`;

/** A name with its definition: under the cursor, and behind a link. */
function term(name, text = name) {
  const meaning = data.definitions[name] || data.definitions[name.split(".")[0]];
  if (!meaning) return document.createTextNode(text);
  const known = data.definitions[name] ? name : name.split(".")[0];
  return make("a", { href: `#${anchor(known)}`, title: meaning, textContent: text });
}

function options(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value, textContent: text })));
}

function row(cells, tag = "td") {
  const line = make("tr");
  for (const cell of cells) line.append(make(tag, {}, cell));
  return line;
}

function hide(id) {
  $(id).hidden = true;
}

// Under the cursor ----------------------------------------------------------------------------------------------------

const tips = new WeakMap(); // element -> function that says what stands in the tip

function showTip(event) {
  const target = event.target instanceof Element ? event.target : null;
  const text = target && tips.get(target);
  const tip = $("tip");
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text();
  const box = target.getClientRects()[0] || target.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - tip.offsetWidth - 8);
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(0, box.top - tip.offsetHeight - 8)}px`;
}

document.addEventListener("pointerover", showTip);
document.addEventListener("click", showTip); // a finger does not hover
document.addEventListener("scroll", () => ($("tip").hidden = true), true);

// Colours of values ---------------------------------------------------------------------------------------------------

// Name -> what a value is from 0 to 1, and the colour of either sign. Orange and blue can be told apart by everybody.
const SCALES = {
  logp: { most: 4, up: "orange", down: "orange", ends: ["0", "-4 or less"] },
  entropy: { most: 1.5, up: "blue", down: "blue", ends: ["0", "1.5 nats or more"] },
  change: { most: 2, up: "blue", down: "orange", ends: ["-2: less likely now", "+2: more likely"] },
  advantage: { most: 1, up: "blue", down: "orange", ends: ["below", "above the group"] },
  kl: { most: 1, up: "purple", down: "purple", ends: ["0", "1 nat or more"] },
  changed: { most: 1, up: "orange", down: "orange", ends: ["same", "changed"] },
};

function shade(scale, value) {
  if (value === null || value === undefined) return "";
  const { most, up, down } = SCALES[scale];
  const strength = Math.sqrt(Math.min(1, Math.abs(value) / most)) * Number(css("--strength"));
  return strength < 0.03 ? "" : `rgba(${css(`--${value > 0 ? up : down}`)}, ${strength.toFixed(3)})`;
}

function drawLegend(id, scale, ends = SCALES[scale].ends) {
  const { most, up, down } = SCALES[scale];
  const low = up === down ? 0 : -most;
  const stops = [];
  for (let i = 0; i <= 8; i++) {
    const value = low + ((most - low) * i) / 8;
    stops.push(shade(scale, value) || "transparent");
  }
  const bar = make("i");
  bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
  $(id).replaceChildren(ends[0], bar, ends[1]);
}

/** Tokens as spans, coloured by values, with what `tell(t)` says under the cursor. */
function tokenText(tokens, scale, values, tell) {
  const box = make("div", { className: "text" });
  tokens.forEach((place, t) => {
    const token = visible(data.spelled[place]).replace(/\n/g, "\u23ce\n");
    const span = make("span", { textContent: token });
    span.style.backgroundColor = shade(scale, values[t]);
    tips.set(span, () => `${inline(data.spelled[place])}   token ${t + 1}\n${tell(t)}`);
    box.append(span);
  });
  return box;
}

/** Back, on, and which part of a list is shown. draw(first, last) fills it. */
function pager(name, size, noun) {
  const state = { found: [], page: 0, draw: null };
  state.show = (page) => {
    const pages = Math.max(1, Math.ceil(state.found.length / size));
    state.page = Math.min(Math.max(0, page), pages - 1);
    const first = state.page * size;
    $(`${name}-list`).replaceChildren(...state.found.slice(first, first + size).map(state.draw));
    $(`${name}-page`).textContent = `page ${state.page + 1} of ${pages}`;
    $(`${name}-back`).disabled = state.page === 0;
    $(`${name}-on`).disabled = state.page === pages - 1;
    $("tip").hidden = true;
  };
  $(`${name}-back`).addEventListener("click", () => state.show(state.page - 1));
  $(`${name}-on`).addEventListener("click", () => state.show(state.page + 1));
  return state;
}

// Overview ------------------------------------------------------------------------------------------------------------

function figure(name, text, value, detail) {
  const label = make("span", {}, term(name, text));
  return make(
    "div",
    { className: "figure" },
    label,
    make("b", { textContent: value }),
    make("span", { textContent: detail }),
  );
}

function drawOverview() {
  const first = data.runs[0];
  const title = data.runs.map((run) => run.label).join(", ");
  document.title = `${visible(title)}: report`;
  $("title").textContent = visible(title);
  const { script, model, data: problems } = first.options;
  const what = [script && `${script}`, model && `from model ${model}`, problems && `on ${problems}`];
  const state = first.finished
    ? count(first.last_step, "step")
    : `unfinished, ${count(first.last_step, "step")} so far`;
  $("subtitle").textContent = visible([...what.filter(Boolean), state].join(", "));
  $("notes").replaceChildren(...data.notes.map((note) => make("p", { className: "note", textContent: visible(note) })));
  const shown = [
    ["eval_accuracy", "held-out accuracy, sampled"],
    ["eval_greedy_accuracy", "held-out accuracy, greedy"],
    ["eval_response_length", "held-out answers, tokens"],
    ["eval_entropy", "entropy, nats per token"],
    ["kl_to_start", "KL to the start, nats per token"],
    ["loss", "loss"],
  ];
  const boxes = [];
  for (const [name, text] of shown) {
    const curve = first.curves[name];
    if (!curve) continue;
    const last = curve.values.length - 1;
    const value = `${figures(curve.values[0])} \u2192 ${figures(curve.values[last])}`;
    boxes.push(figure(name, text, value, `step ${curve.steps[0]} \u2192 ${curve.steps[last]}`));
  }
  if (first.curves.seconds) {
    const seconds = first.curves.seconds.values.reduce((sum, value) => sum + value, 0);
    boxes.push(figure("seconds", "time in steps", `${(seconds / 60).toFixed(1)} min`, "without evaluations"));
  }
  $("figures").replaceChildren(...boxes);
}

function drawNavigation() {
  const links = [];
  for (const section of document.querySelectorAll("main > section")) {
    const heading = section.querySelector("h2");
    if (heading && !section.hidden) links.push(make("a", { href: `#${section.id}`, textContent: heading.textContent }));
  }
  $("nav").replaceChildren(...links);
}

// Curves --------------------------------------------------------------------------------------------------------------

// Runs get a colour each; what is measured, a line: samples of training thin, evaluations with marks.
const colours = () => [
  css("--ink"),
  "#D55E00",
  isDark.matches ? "#56B4E9" : "#0072B2",
  "#009E73",
  "#CC79A7",
  "#E69F00",
];

function lineOf(name, i) {
  const alone = data.runs.length === 1;
  const [, orange, blue, green] = colours();
  const colour = colours()[i];
  if (name === "eval_greedy_accuracy") {
    return {
      mode: "lines+markers",
      line: { color: alone ? orange : colour, dash: "dot", width: 2 },
      marker: { symbol: "triangle-up", size: 9 },
    };
  }
  if (name.startsWith("eval_") || name === "kl_to_start") {
    return { mode: "lines+markers", line: { color: alone ? blue : colour, width: 2.5 }, marker: { size: 8 } };
  }
  if (name === "trained_entropy")
    return { mode: "lines", line: { color: alone ? green : colour, dash: "dash", width: 1.6 } };
  return { mode: "lines", line: { color: alone ? "#888f97" : colour, width: 1.3 }, opacity: alone ? 1 : 0.6 };
}

function traces(names) {
  const found = [];
  for (const name of names) {
    data.runs.forEach((run, i) => {
      const curve = run.curves[name];
      if (!curve) return;
      const label = data.runs.length === 1 ? name : `${name}, ${run.label}`;
      const isFirst = !found.some((trace) => trace.legendgroup === name);
      const style = lineOf(name, i);
      if (curve.values.length === 1) style.mode = "markers";
      found.push({
        x: curve.steps,
        y: curve.values,
        name: escaped(isFirst ? name : label),
        legendgroup: name,
        showlegend: isFirst,
        hovertemplate: `${escaped(label)}: %{y:.4~g}<extra></extra>`,
        ...style,
      });
    });
  }
  return found;
}

/** The steps in which an internal policy was trained, as shaded stretches. */
function phases() {
  const shapes = [];
  for (const run of data.runs) {
    for (const [first, last] of run.internal) {
      shapes.push({
        type: "rect",
        xref: "x",
        yref: "paper",
        x0: first - 0.5,
        x1: last + 0.5,
        y0: 0,
        y1: 1,
        layer: "below",
        fillcolor: css("--shade"),
        line: { width: 0 },
      });
    }
  }
  return shapes;
}

function layout(title, log = false) {
  const ink = css("--ink");
  const axis = { gridcolor: css("--grid"), zeroline: false, linecolor: css("--line"), automargin: true };
  return {
    title: { text: escaped(title), font: { size: 14 }, x: 0.02, xanchor: "left" },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, family: "system-ui, sans-serif", size: 12 },
    margin: { l: 46, r: 10, t: 34, b: 74 },
    hovermode: "x unified",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: ink } },
    xaxis: { ...axis, title: { text: "step", standoff: 4 }, hoverformat: "d" },
    yaxis: { ...axis, type: log ? "log" : "linear", rangemode: log ? "normal" : "tozero" },
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { size: 11 } },
    showlegend: true,
    shapes: phases(),
  };
}

const SETTINGS = { responsive: true, displaylogo: false, displayModeBar: false };

function drawPanels() {
  const panels = [];
  for (const [title, names] of Object.entries(data.panels)) {
    const lines = traces(names);
    if (!lines.length) continue;
    let box = $(`panel-${panels.length}`);
    if (!box) {
      box = make("div", { className: "plot", id: `panel-${panels.length}` });
      $("panels").append(box);
    }
    panels.push(box);
    Plotly.react(box, lines, layout(title), SETTINGS);
  }
  drawMetric();
}

function drawMetric() {
  const name = $("metric").value;
  if (name) Plotly.react($("metric-plot"), traces([name]), layout(name, $("scale").value === "log"), SETTINGS);
}

function prepareCurves() {
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))];
  if (!names.length) return hide("curves");
  const inPanels = Object.values(data.panels).flat();
  const others = names.filter((name) => !inPanels.includes(name));
  options(
    $("metric"),
    [...others, ...names.filter((name) => inPanels.includes(name))].map((name) => [name, name]),
  );
  const preferred = ["reward", "loss"].find((name) => names.includes(name));
  if (preferred) $("metric").value = preferred;
  $("metric").addEventListener("change", drawMetric);
  $("scale").addEventListener("change", drawMetric);
  const legend = $("curves-legend");
  if (data.runs.length > 1) {
    data.runs.forEach((run, i) => {
      const name = make("b", { textContent: `\u25ac ${visible(run.label)}   ` });
      name.style.color = colours()[i];
      legend.append(name);
    });
  }
  const spans = data.runs.flatMap((run) => run.internal.map(([first, last]) => `${run.label} ${first} to ${last}`));
  if (spans.length)
    legend.append(
      "Shaded: steps in which an ",
      term("phase", "internal policy"),
      ` was trained (${spans.join("; ")}). `,
    );
  legend.append("Lines with marks: evaluations on held-out problems.");
  drawEvaluations();
}

function drawEvaluations() {
  const lines = [];
  let names = [];
  for (const run of data.runs)
    names.push(...Object.keys(run.curves).filter((name) => name.startsWith("eval_") || name === "kl_to_start"));
  names = [...new Set(names)];
  for (const run of data.runs) {
    const steps = new Set(names.flatMap((name) => (run.curves[name] ? run.curves[name].steps : [])));
    for (const step of [...steps].sort((a, b) => a - b)) {
      const cells = names.map((name) => {
        const at = run.curves[name] ? run.curves[name].steps.indexOf(step) : -1;
        return at < 0 ? "" : number(run.curves[name].values[at]);
      });
      lines.push(row([visible(run.label), String(step), ...cells]));
    }
  }
  if (!lines.length) return ($("evaluations").closest("details").hidden = true);
  const head = row(["run", "step", ...names.map((name) => term(name))], "th");
  $("evaluations").replaceChildren(make("thead", {}, head), make("tbody", {}, ...lines));
}

// Answers of training -------------------------------------------------------------------------------------------------

const answers = data.answers && data.answers.columns;
const lookedAt = (data.looked_at && data.looked_at.answers) || {};
const list = pager("answers", 10);

const problemOf = (i) => answers.problem.texts[answers.problem.places[i]] ?? "";
const goldOf = (i) => answers.gold.texts[answers.gold.places[i]] ?? "";

function verdictOf(i) {
  if (answers.reward[i] === 1) return "right";
  return answers.reward[i] > 0 ? "partly" : "wrong";
}

function matching() {
  const [stepFrom, stepTo, lengthFrom, lengthTo] = ["step-from", "step-to", "length-from", "length-to"].map(
    (id) => $(id).value,
  );
  const verdict = $("verdict").value;
  const search = $("search").value.toLowerCase();
  const onlyValues = $("only-values").checked;
  const found = [];
  for (let i = 0; i < answers.text.length; i++) {
    if (onlyValues && !(i in lookedAt)) continue;
    if (stepFrom !== "" && answers.step[i] < Number(stepFrom)) continue;
    if (stepTo !== "" && answers.step[i] > Number(stepTo)) continue;
    if (lengthFrom !== "" && answers.length[i] < Number(lengthFrom)) continue;
    if (lengthTo !== "" && answers.length[i] > Number(lengthTo)) continue;
    if (verdict === "cut" ? answers.finished[i] !== false : verdict && verdictOf(i) !== verdict) continue;
    if (search && !`${problemOf(i)}\n${answers.text[i]}`.toLowerCase().includes(search)) continue;
    found.push(i);
  }
  const [column, direction] = $("order").value.split("-");
  if (column) {
    const sign = direction === "down" ? -1 : 1;
    const place = (i) => sign * (answers[column][i] ?? sign * Number.MAX_VALUE); // without a number: last
    found.sort((a, b) => place(a) - place(b) || a - b);
  }
  return found;
}

function updateAnswers() {
  list.found = matching();
  const n = count(list.found.length, "answer");
  const held =
    answers.text.length === data.answers.total
      ? ""
      : ` in the page, which were ${data.answers.total.toLocaleString("en")} in the run`;
  const right = list.found.filter((i) => answers.reward[i] === 1).length;
  const share = list.found.length ? `, ${percent(right / list.found.length)} of them right` : "";
  $("answers-count").textContent = `${n} of ${answers.text.length.toLocaleString("en")}${held}${share}`;
  list.show(0);
}

/** The values that colour an answer's tokens, or null where there are none. */
function valuesOf(i, scale, policy) {
  const here = lookedAt[i];
  if (!here) return null;
  if (scale === "advantage") return here.tokens.map(() => answers.advantage[i]);
  if (scale !== "change") return here[policy] ? here[policy][scale] : null;
  if (!here.end || !here.start) return null;
  return here.end.logp.map((value, t) => value - here.start.logp[t]);
}

function tellToken(here, t) {
  const lines = [];
  for (const [name, text] of [
    ["start", "starting model"],
    ["end", "last model"],
  ]) {
    if (here[name])
      lines.push(
        `${text}: log-prob ${number(here[name].logp[t])}, p ${percent(Math.exp(here[name].logp[t]))}, ` +
          `entropy ${number(here[name].entropy[t])}`,
      );
  }
  return lines.join("\n");
}

function verdictText(i) {
  const verdict = verdictOf(i);
  const text = {
    right: "\u2713 right",
    partly: `partly right, reward ${number(answers.reward[i])}`,
    wrong: "\u2717 wrong",
  }[verdict];
  return make("span", { className: verdict === "right" ? "right" : "wrong", textContent: text });
}

function answerBody(i) {
  const scale = $("colour").value;
  const values = valuesOf(i, scale, $("policy").value);
  if (values)
    return withRest(
      i,
      tokenText(lookedAt[i].tokens, scale, values, (t) => tellToken(lookedAt[i], t)),
    );
  const box = make("div", { className: "text", textContent: visible(answers.text[i]) });
  if (scale === "advantage") box.style.backgroundColor = shade(scale, answers.advantage[i]);
  return box;
}

/** The tokens of an answer, and what they do not spell: text behind the last one, or characters without a token. */
function withRest(i, box) {
  const text = answers.text[i];
  const words = lookedAt[i].tokens.map((place) => data.spelled[place]);
  const spelled = words.join("");
  if (spelled === text || words.slice(0, -1).join("") === text) return box;
  if (text.startsWith(spelled)) {
    box.append(
      make("i", {
        className: "quiet",
        textContent: visible(text.slice(spelled.length)),
        title: "behind --answer_tokens",
      }),
    );
    return box;
  }
  const logged = make("div", { className: "text", textContent: visible(text) });
  return make(
    "div",
    {},
    box,
    make("span", { className: "quiet", textContent: "The tokens spell it otherwise than the log:" }),
    logged,
  );
}

function answerCard(i) {
  const group = make("button", { type: "button", textContent: "its group", title: data.definitions.group });
  group.addEventListener("click", () => {
    clearFilters();
    $("only-values").checked = false;
    $("step-from").value = $("step-to").value = answers.step[i];
    $("search").value = problemOf(i);
    updateAnswers();
    $("answers").scrollIntoView();
  });
  const advantage = answers.advantage[i];
  const top = make(
    "div",
    { className: "top" },
    make("span", { className: "problem", textContent: visible(problemOf(i)) }),
    make("span", { textContent: `step ${answers.step[i]}` }),
    advantage === null ? null : make("span", {}, term("advantage"), ` ${signed(advantage)}`),
    make("span", {
      textContent: `${count(answers.length[i] ?? 0, "token")}${answers.finished[i] === false ? ", cut off" : ""}`,
    }),
    verdictText(i),
    group,
  );
  const extracted = answers.answer[i];
  const bottom = make(
    "div",
    { className: "bottom" },
    "extracted ",
    make("b", {
      className: `mono extracted ${answers.reward[i] === 1 ? "right" : "wrong"}`,
      textContent: extracted ? visible(extracted) : "nothing",
    }),
    ", gold ",
    make("b", { className: "mono gold", textContent: visible(goldOf(i)) }),
  );
  const card = make("article", { className: "card" }, top, answerBody(i), bottom);
  card.dataset.row = i;
  return card;
}

function recolour() {
  const scale = $("colour").value;
  $("policy").disabled = !["logp", "entropy"].includes(scale);
  drawLegend("answers-legend", scale);
  list.show(list.page);
}

function clearFilters() {
  for (const id of ["step-from", "step-to", "length-from", "length-to", "search", "verdict", "order"]) $(id).value = "";
}

function prepareAnswers() {
  if (!answers) return hide("answers");
  list.draw = answerCard;
  const advantages = answers.advantage.filter((value) => value !== null);
  SCALES.advantage.most = advantages.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
  const rows = Object.values(lookedAt);
  const policies = [
    ["end", "the last model"],
    ["start", "the starting model"],
  ].filter(([name]) => rows.some((here) => here[name]));
  options($("policy"), policies);
  const drop = (value) => $("colour").querySelector(`option[value="${value}"]`).remove();
  if (!policies.length) ["logp", "entropy"].forEach(drop);
  if (policies.length < 2) drop("change");
  if (!advantages.length) {
    drop("advantage");
    for (const option of [...$("order").options]) if (option.value.startsWith("advantage")) option.remove();
  }
  if (!$("colour").options.length) $("colour").closest(".controls").hidden = true;
  $("only-values").checked = rows.length > 0;
  $("only-values").parentElement.hidden = !rows.length;
  if (rows.length) {
    const same = `${data.looked_at.as_logged} of ${count(rows.length, "answer")}`;
    $("answers-measured").textContent =
      `Numbers of every token are computed anew from the text, at temperature ${data.temperature}; ` +
      `${same} split into as many tokens as were sampled.`;
  }
  let timer = 0;
  $("answers-controls").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(updateAnswers, 60);
  });
  $("reset").addEventListener("click", () => {
    clearFilters();
    updateAnswers();
  });
  $("colour").addEventListener("change", recolour);
  $("policy").addEventListener("change", recolour);
  updateAnswers();
  if ($("colour").value) recolour();
}

// Before and after ----------------------------------------------------------------------------------------------------

const compared = data.compared || [];
const compareList = pager("compare", 6);
const SIDES = [
  ["start", "before"],
  ["end", "after"],
];

/** 1 where the two answers differ, for every position of the longer one. */
function changes(pair) {
  const longest = Math.max(pair.start.tokens.length, pair.end.tokens.length);
  return Array.from({ length: longest }, (_, t) => Number(pair.start.tokens[t] !== pair.end.tokens[t]));
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
const bothAnswer = compared.length > 0 && compared[0].start && compared[0].end;

function tellPosition(side, t) {
  const lines = side.kl.length ? [`KL(end || start) ${number(side.kl[t])}`] : [];
  for (const [name, text] of SIDES) {
    if (side[name])
      lines.push(
        `likeliest ${text}: ${inline(data.spelled[side[name].favourite[t]])} ${percent(side[name].probability[t])}`,
      );
  }
  return lines.join("\n");
}

function compareSide(pair, name, text) {
  const side = pair[name];
  if (!side) return null;
  const scale = $("compare-colour").value;
  const values = scale === "kl" || !bothAnswer ? side.kl : changes(pair);
  const verdict = make("span", {
    className: side.right ? "right" : "wrong",
    textContent: side.right ? "\u2713 right" : "\u2717 wrong",
  });
  const head = make(
    "h4",
    {},
    `${text}: `,
    verdict,
    ", extracted ",
    make("b", { className: "mono", textContent: side.answer ? visible(side.answer) : "nothing" }),
    side.finished ? "" : ", cut off",
  );
  return make(
    "div",
    { className: `side ${name}` },
    head,
    tokenText(side.tokens, scale, values, (t) => tellPosition(side, t)),
  );
}

function compareCard(i) {
  const pair = compared[i];
  const top = make(
    "div",
    { className: "top" },
    make("span", { className: "problem", textContent: visible(pair.problem) }),
    make("span", {}, "gold ", make("b", { className: "mono gold", textContent: visible(pair.gold) })),
  );
  if (bothAnswer) {
    const changed = changes(pair);
    top.append(
      make("span", { textContent: `${sum(changed)} of ${count(changed.length, "position")} changed` }),
      make("span", { textContent: `largest KL ${number(Math.max(0, ...pair.end.kl), 3)}` }),
    );
  }
  const sides = SIDES.map(([name, text]) => compareSide(pair, name, text));
  const card = make("article", { className: "card" }, top, make("div", { className: "sides" }, ...sides));
  card.dataset.row = i;
  return card;
}

function updateCompared() {
  const filter = $("compare-filter").value;
  const keep = {
    gained: ({ start, end }) => !start.right && end.right,
    lost: ({ start, end }) => start.right && !end.right,
    changed: (pair) => sum(changes(pair)) > 0,
  }[filter];
  const found = compared.map((_, i) => i).filter((i) => !keep || keep(compared[i]));
  const measure = {
    kl: (pair) => Math.max(0, ...pair.end.kl),
    changed: (pair) => mean(changes(pair)),
  }[$("compare-order").value];
  if (measure && bothAnswer) {
    const size = found.map((i) => measure(compared[i]));
    const bySize = new Map(found.map((i, at) => [i, size[at]]));
    found.sort((a, b) => bySize.get(b) - bySize.get(a) || a - b);
  }
  compareList.found = found;
  $("compare-count").textContent =
    `${found.length} of ${count(compared.length, "held-out problem")}, answered greedily`;
  drawLegend("compare-legend", $("compare-colour").value);
  compareList.show(0);
}

function drawCompareFigures() {
  const boxes = [];
  const rights = SIDES.filter(([name]) => compared[0][name]).map(([name]) =>
    mean(compared.map((pair) => Number(pair[name].right))),
  );
  boxes.push(
    figure(
      "eval_greedy_accuracy",
      "greedy accuracy here",
      rights.map(percent).join(" \u2192 "),
      count(compared.length, "problem"),
    ),
  );
  if (bothAnswer) {
    const changed = compared.map(changes);
    const positions = sum(changed.map((values) => values.length));
    boxes.push(
      figure(
        "changed positions",
        "changed positions",
        percent(sum(changed.map(sum)) / positions),
        `of ${count(positions, "position")}`,
      ),
    );
    const ends = compared.map((pair) => pair.end);
    const tokens = sum(ends.map((end) => end.tokens.length));
    const favourites = sum(
      ends.map((end) => end.end.favourite.filter((place, t) => place !== end.start.favourite[t]).length),
    );
    boxes.push(
      figure(
        "changed favourites",
        "changed favourites",
        percent(favourites / tokens),
        `of ${count(tokens, "position")}`,
      ),
    );
    boxes.push(
      figure(
        "KL at a position",
        "KL along the answers after",
        number(sum(ends.map((end) => sum(end.kl))) / tokens, 3),
        "nats, mean over positions",
      ),
    );
  }
  $("compare-figures").replaceChildren(...boxes);
}

function drawLargest() {
  const places = [];
  compared.forEach((pair, i) => pair.end.kl.forEach((kl, t) => places.push({ i, t, kl })));
  places.sort((a, b) => b.kl - a.kl);
  const lines = places.slice(0, 12).map(({ i, t, kl }) => {
    const { end, problem } = { ...compared[i] };
    const before = end.tokens
      .slice(Math.max(0, t - 12), t)
      .map((place) => inline(data.spelled[place]))
      .join("");
    const favourite = (name) =>
      make(
        "span",
        {},
        make("code", { textContent: inline(data.spelled[end[name].favourite[t]]) }),
        ` ${percent(end[name].probability[t])}`,
      );
    const context = make("code", { textContent: (t > 12 ? "\u2026" : "") + (before || "(first token)") });
    return row([number(kl, 3), visible(problem).slice(0, 80), context, favourite("start"), favourite("end")]);
  });
  const head = row(
    [term("KL at a position", "KL"), "problem", "after the tokens", "likeliest before", "likeliest after"],
    "th",
  );
  $("largest").replaceChildren(make("thead", {}, head), make("tbody", {}, ...lines));
}

function prepareCompared() {
  if (!compared.length) return hide("before-after");
  compareList.draw = compareCard;
  for (const id of ["compare-filter", "compare-order", "compare-colour"]) {
    $(id).addEventListener("change", updateCompared);
    if (!bothAnswer) $(id).parentElement.hidden = true;
  }
  drawCompareFigures();
  if (bothAnswer) drawLargest();
  else $("largest").parentElement.previousElementSibling.hidden = true;
  updateCompared();
}

// Inside --------------------------------------------------------------------------------------------------------------

const maps = data.maps || [];
let lens = "";

function blockName(depth, depths) {
  if (depth === 0) return "embedding";
  return depth === depths - 1 ? "whole policy" : `block ${depth - 1}`;
}

function drawMap() {
  const map = maps[Number($("map-answer").value)];
  const rows = map.policies[$("map-policy").value][lens];
  const head = make(
    "tr",
    {},
    make("th", {
      textContent: map.tokens.length < map.length ? `first ${map.tokens.length} of ${map.length}` : "written",
    }),
  );
  for (const place of map.tokens)
    head.append(make("th", { className: "mono", textContent: inline(data.spelled[place]) }));
  const lines = rows.map((cells, depth) => {
    const line = make("tr", {}, make("th", { textContent: blockName(depth, rows.length) }));
    cells.tops.forEach((tops, t) => {
      const cell = make("td", {
        textContent: inline(data.spelled[tops[0]]),
        className: tops[0] === map.tokens[t] ? "written" : "",
      });
      cell.style.backgroundColor = shade("entropy", cells.entropy[t]);
      const show = () => tellCell(cell, map, cells, t, blockName(depth, rows.length));
      cell.addEventListener("pointerenter", show);
      cell.addEventListener("click", show);
      line.append(cell);
    });
    return line;
  });
  lines.reverse(); // the whole policy on top
  $("map").replaceChildren(make("thead", {}, head), make("tbody", {}, ...lines));
  for (const button of $("map-lens").children) button.setAttribute("aria-pressed", String(button.value === lens));
  drawLegend("map-legend", "entropy");
  const top = rows[rows.length - 1].entropy;
  $("map").tBodies[0].rows[0].cells[1 + top.indexOf(Math.max(...top))].click();
}

function tellCell(cell, map, cells, t, name) {
  for (const old of $("map").querySelectorAll(".at")) old.classList.remove("at");
  cell.classList.add("at");
  const lines = cells.tops[t].map((place, rank) => {
    const bar = make("span", { className: "bar" });
    bar.style.width = `${Math.max(1, 160 * cells.probabilities[t][rank])}px`;
    const token = make("code", { className: "mono", textContent: inline(data.spelled[place]) });
    return row([token, percent(cells.probabilities[t][rank]), bar]);
  });
  const title = make(
    "p",
    {},
    make("b", {}, `${name}, `, term(`${lens} lens`)),
    `, where token ${t + 1}, `,
    make("code", { className: "mono", textContent: inline(data.spelled[map.tokens[t]]) }),
    ", was written: ",
    term("entropy of a token", "entropy"),
    ` ${number(cells.entropy[t])} nats`,
  );
  $("map-cell").replaceChildren(title, make("table", {}, make("tbody", {}, ...lines)));
}

/** Arrow keys walk over the cells of the map. */
function walk(event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!steps) return;
  event.preventDefault();
  const now = $("map").querySelector(".at") || $("map").querySelector("td");
  const lines = [...$("map").tBodies[0].rows];
  const line = lines[lines.indexOf(now.parentElement) + steps[0]];
  const next = line && line.cells[now.cellIndex + steps[1]];
  if (next && next.tagName === "TD") {
    next.click();
    next.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
}

function prepareMaps() {
  if (!maps.length) return hide("inside");
  options(
    $("map-answer"),
    maps.map((map, i) => [i, visible(map.problem).slice(0, 100)]),
  );
  const names = { end: "after training", start: "before training" };
  options(
    $("map-policy"),
    Object.keys(maps[0].policies).map((name) => [name, names[name]]),
  );
  const lenses = Object.keys(Object.values(maps[0].policies)[0]);
  lens = lenses[0];
  for (const name of lenses) {
    const button = make("button", {
      type: "button",
      value: name,
      textContent: name,
      title: data.definitions[`${name} lens`] || "",
    });
    button.addEventListener("click", () => {
      lens = name;
      drawMap();
    });
    $("map-lens").append(button);
  }
  $("map-answer").addEventListener("change", drawMap);
  $("map-policy").addEventListener("change", drawMap);
  $("map").addEventListener("keydown", walk);
  drawMap();
}

// The run -------------------------------------------------------------------------------------------------------------

function drawFaults() {
  const lines = [];
  for (const run of data.runs) {
    for (const { fault, first, times, remedy } of run.faults) {
      const name = data.runs.length > 1 ? `${visible(run.label)}: ` : "";
      lines.push(
        make("p", {
          className: "note",
          textContent: `${name}${fault}, in ${count(times, "step")}, first in step ${first}: ${remedy}`,
        }),
      );
    }
  }
  $("faults").replaceChildren(...(lines.length ? lines : [make("p", { textContent: "None." })]));
}

function drawTable(id, part, onlyDifferent = false) {
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run[part] || {})))];
  const lines = [];
  for (const name of names) {
    const values = data.runs.map((run) => run[part][name]);
    const differs = values.some((value) => value !== values[0]);
    if (onlyDifferent && !differs) continue;
    const line = make("tr", { className: differs ? "different" : "" }, make("th", {}, term(name)));
    for (const value of values) {
      const text = value === undefined ? "\u2013" : value === "" ? "''" : visible(String(value));
      line.append(make("td", { className: "mono", textContent: text }));
    }
    lines.push(line);
  }
  const head = row(["", ...data.runs.map((run) => visible(run.label))], "th");
  $(id).replaceChildren(make("thead", {}, head), make("tbody", {}, ...lines));
}

function prepareRun() {
  drawFaults();
  drawTable("options", "options");
  drawTable("versions", "versions");
  $("only-different").parentElement.hidden = data.runs.length < 2;
  $("only-different").addEventListener("change", () => drawTable("options", "options", $("only-different").checked));
  for (const [name, meaning] of Object.entries(data.definitions)) {
    $("definitions-list").append(
      make("dt", { id: anchor(name), textContent: name }),
      make("dd", { textContent: meaning }),
    );
  }
}

// All of it -----------------------------------------------------------------------------------------------------------

/** The plotly library, unpacked from the page itself. */
async function loadLibrary() {
  const letters = atob($("library").textContent);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(make("script", { textContent: await new Response(stream).text() }));
}

function restyle() {
  drawPanels();
  if (answers && $("colour").value) recolour();
  if (compared.length) updateCompared();
  if (maps.length) drawMap();
}

async function main() {
  prepareCurves();
  prepareAnswers();
  prepareCompared();
  prepareMaps();
  prepareRun();
  drawOverview();
  drawNavigation();
  if (!$("curves").hidden) {
    await loadLibrary();
    drawPanels();
    isDark.addEventListener("change", restyle);
  }
  document.documentElement.dataset.ready = "yes";
}

main();
