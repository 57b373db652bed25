"""What all figures share: panels, colours that can be told apart in grey, too, and saving. matplotlib is imported where
a figure is drawn, so that the scripts start without it."""

import re
import warnings

from plumbing.files import read_log
from plumbing.runs import is_number

# Okabe and Ito's colours, which colour-blind readers can tell apart; line and mark do the same in a grey print.
COLOURS = ("black", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
LINES = ("-", "--", "-.", ":")
MARKS = "os^Dv"


def style_of(i):
    """Colour, line and mark of the i-th of several curves, as keyword arguments of matplotlib's plot."""
    return dict(
        color=COLOURS[i % len(COLOURS)],
        linestyle=LINES[i % len(LINES)],
        marker=MARKS[i % len(MARKS)],
    )


def panels(rows, columns, width, height, **shared):
    """(figure, axes [rows, columns]) of width x height inches; shared: further arguments of `subplots`, such as sharey.

    Text is drawn as it is, never read as a formula: a token may be a dollar sign.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def legend_below(figure, axis, columns):
    """One legend for the whole figure, below its panels, with the curves of one of them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def logarithmic(set_scale, axis):
    """Make an axis logarithmic, with plain numbers: matplotlib would write powers of ten as formulas, see `panels`."""
    set_scale("log")
    axis.set_major_formatter("{x:g}")


def save_figures(folder, figures, dpi=150):
    """Write figures (name -> Figure) as PNG files into a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a token in a script that the font lacks: drawn as a box
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=dpi)


def file_name(text):
    """A text, such as the path of a model, as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_")


def visible(token, length):
    """The text of a token, its white space made visible, cut to some characters."""
    return token.replace("\n", "\u23ce").replace(" ", "\u2423")[:length]


# The curves of a training run ---------------------------------------------------------------------------------------

# Title -> metrics of metrics.jsonl, with colour, mark and line of each.
CURVES = {
    "accuracy": {"accuracy": "0.6", "eval_accuracy": "ko-", "eval_greedy_accuracy": "k^:"},
    "entropy (nats per token)": {"entropy": "0.6", "eval_entropy": "ko-", "trained_entropy": "k--"},
    "response length (tokens)": {"response_length": "0.6", "eval_response_length": "ko-"},
    "KL to the starting model (nats per token)": {"kl_to_start": "ko-"},
}


def draw_curves(folder):
    """curves.png of a run, from its metrics.jsonl: accuracy, entropy, length and KL against steps; the steps in which
    an internal policy was trained are shaded."""
    records = read_log(folder / "metrics.jsonl")
    internal_steps = [record["step"] for record in records if record.get("phase") == "internal"]
    last_internal = max(internal_steps, default=0)
    figure, axes = panels(2, 2, 10, 6.4, sharex=True)
    for axis, (title, styles) in zip(axes.flat, CURVES.items()):
        for name, style in styles.items():
            draw_curve(axis, records, name, style)
        if last_internal > 0:
            axis.axvspan(0, last_internal, color="tab:orange", alpha=0.2, label="internal policy trained")
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.legend(fontsize=8)
    save_figures(folder, {"curves": figure}, dpi=100)


def draw_curve(axis, records, name, style):
    """One metric against steps, of the records that have it as a number."""
    steps = []
    values = []
    for record in records:
        if is_number(record.get(name)):
            steps.append(record["step"])
            values.append(record[name])
    axis.plot(steps, values, style, label=name, markersize=4)
