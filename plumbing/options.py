"""The command line: what all training scripts can be told, how a dataclass becomes options, and what is refused.

Nothing here imports torch or transformers, so that --help answers at once, see start.py.
"""

import argparse
import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tasks
from plumbing import processes
from plumbing.errors import UserError, explain

EMBEDDED_MODEL = Path("runs/tiny")  # where sft.py keeps the embedded model

SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."


LARGEST = 2**31 - 1  # number that an option takes, unless it says otherwise: no tensor is longer


def option(default, help, above=None, at_least=None, at_most=LARGEST):
    """A dataclass field that `parse` turns into a command line option.

    help: a literal % in it is fine. above, at_least, at_most: bounds of a number; None for no bound.
    """
    metadata = {"help": help, "above": above, "at_least": at_least, "at_most": at_most}
    return dataclasses.field(default=default, metadata=metadata)


MOST_ANSWERS = 10**6  # of one step: more fit into no memory
MOST_SAMPLES = 10**5  # of one problem

# Arguments of apply_chat_template that say what it returns; the scripts need tokens behind a generation prompt.
NOT_FOR_TEMPLATES = ("tokenize", "return_dict", "return_tensors", "add_generation_prompt", "continue_final_message")

LOWEST_TEMPERATURE = 0.01  # logits divided by less may overflow, and the samples are greedy long before


@dataclass
class RunArgs:
    """Options of every training script. Each script's `Args` adds its own, with the paper's values."""

    model: str = option(
        "embedded",
        "'embedded' (tiny, built on first use), a local folder, or a hub id",
    )
    data: str = option(
        tasks.DEFAULT,
        f"{', '.join(tasks.built_in())}, FILE.jsonl, hf://datasets/OWNER/NAME/FILE.jsonl, or a data set of the hub, "
        "with :CONFIG if it has several (openai/gsm8k:main)",
    )
    eval_data: str = option(
        "",
        "held-out problems, as --data; '': the held-out split of built-in data, else none",
    )
    system_prompt: str = option(SYSTEM_PROMPT, "system message before every problem; '' for none")
    chat_template_kwargs: str = option(
        '{"enable_thinking": false}',
        "JSON object for the tokenizer's chat template",
    )
    max_prompt_length: int = option(1024, "tokens; longer prompts are dropped and listed", above=0)
    max_completion_length: int = option(
        8192,
        "tokens; longer completions are cut and score 0",
        above=0,
    )
    max_rollout_tokens: int = option(
        2**18,
        "tokens (prompt + completion) sampled at once: bounds the key-value cache",
        above=0,
    )
    micro_batch_tokens: int = option(
        2**14,
        "tokens per forward and backward: bounds activations, changes no gradient",
        above=0,
    )
    temperature: float = option(
        1.0,
        "sampling temperature; log-probs and entropies are taken at the same one",
        at_least=LOWEST_TEMPERATURE,
    )
    learning_rate: float = option(1e-6, "AdamW step size, constant", at_least=0)
    lr_below: str | None = option(
        None,
        "K:FACTOR, the learning rate of the embedding and the blocks below K times FACTOR",
    )
    train_blocks: str | None = option(
        None,
        "A:B trains blocks A to B - 1 alone, counted from 0; the rest, embedding and head too, stays as it is",
    )
    weight_decay: float = option(0.01, "AdamW decoupled decay; 0 for none", at_least=0)
    max_grad_norm: float = option(
        1.0,
        "the gradient is scaled down to this norm; inf for never",
        above=0,
        at_most=math.inf,
    )
    device: str = option("auto", "'auto' (cuda if there is one), 'cpu', 'cuda', 'cuda:1', ...")
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto",
        "of weights; auto: bfloat16 on cuda, else float32",
    )
    gradient_checkpointing: bool = option(
        True,
        "recompute blocks in the backward pass: less memory, a third more time",
    )
    optimizer_device: Literal["", "cpu"] = option(
        "",
        "'cpu': fp32 masters and moments in host memory; '': on --device",
    )
    reward: Literal["right", "random", "inverted", "format", "majority"] = option(
        "right",
        "what earns it: a right answer; a toss of a coin; a wrong answer; any answer that can be judged; the most "
        "frequent answer of its group. Logged accuracy and evaluation stay true",
    )
    grade_timeout: float = option(
        3.0,
        "seconds the verifier may spend on one answer, which then scores 0",
        at_least=0.01,
        at_most=3600,
    )
    max_grader_errors: float = option(
        0.2,
        "stop when a larger share of a step's answers defeats the verifier",
        above=0,
    )
    seed: int = option(0, "drives data order and sampling", at_least=0, at_most=2**63 - 1)
    output_dir: str = option("runs/run", "folder of everything this run writes")
    overwrite: bool = option(
        False,
        "train again although the folder holds a run: deletes that run's files",
    )
    save_steps: int = option(50, "steps between checkpoints; 0: only the final model", at_least=0)
    save_total_limit: int = option(2, "newest checkpoints kept; 0: all", at_least=0)
    eval_steps: int = option(
        20,
        "steps between evaluations, the first before step 1; 0: none",
        at_least=0,
    )
    eval_problems: int = option(
        256,
        "held-out problems, the first of --eval_data; 0: all",
        at_least=0,
    )
    eval_samples: int = option(
        4,
        "sampled answers per held-out problem, beside one greedy answer",
        above=0,
        at_most=MOST_SAMPLES,
    )
    eval_temperature: float = option(
        1.0,
        "temperature of the sampled evaluation answers, whatever --temperature is",
        at_least=LOWEST_TEMPERATURE,
    )
    report_to: Literal["none", "trackio", "wandb"] = option(
        "none",
        "log there, too; metrics.jsonl is always written",
    )

    def __post_init__(self):
        """Raise UserError for a value that could only fail later."""
        for field in dataclasses.fields(self):
            check_bounds(field, getattr(self, field.name))
        with explain(f"--chat_template_kwargs {self.chat_template_kwargs!r}", "must be a JSON object, like '{}'"):
            for name, _ in json.loads(self.chat_template_kwargs).items():
                if name in NOT_FOR_TEMPLATES:
                    raise UserError(f"--chat_template_kwargs: {name} is not for the template; leave it out")
        for name in ("model", "data"):
            if not getattr(self, name).strip():
                raise UserError(f"--{name} '': names nothing; leave the option out, or name one")
        answers = getattr(self, "num_prompts", 1) * getattr(self, "num_generations", 1)
        if answers > MOST_ANSWERS:
            raise UserError(f"--num_prompts, --num_generations: {answers} answers a step; {MOST_ANSWERS} at most")


def check_bounds(field, value):
    """Raise UserError if a number lies outside the bounds of its option. What is no number has none."""
    if type(value) not in (int, float):
        return
    above = field.metadata.get("above")
    if above is not None and not value > above:
        raise UserError(f"--{field.name} {value}: must be above {above}")
    at_least = field.metadata.get("at_least")
    if at_least is not None and not value >= at_least:
        raise UserError(f"--{field.name} {value}: must be at least {at_least}")
    at_most = field.metadata.get("at_most")
    if at_most is not None and not value <= at_most:
        raise UserError(f"--{field.name} {value}: must be at most {at_most}")


def is_embedded(model):
    """True for 'embedded' and for any folder trained from it (its config carries the mark)."""
    if model == "embedded":
        return True
    config = Path(model) / "config.json"
    return config.is_file() and '"embedded": true' in config.read_text(errors="replace")


def without_help(words):
    """A command line without its request for help: parsing it first must not print and exit."""
    return [word for word in words if word not in ("-h", "--help")]


class Parser(argparse.ArgumentParser):
    """argparse whose complaints, and those of its sub-commands, become UserErrors."""

    trains = False  # whether the script goes with several processes

    def parse_args(self, args=None, namespace=None):
        if processes.count() > 1 and not self.trains:
            self.error(f"{self.prog} trains nothing: start it by python, not by torchrun")
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown option or stray value: {' '.join(unknown)}{self.suggestion(unknown[0])}")
        return found

    def suggestion(self, word):
        """'; did you mean --max_steps?' where an option is spelt nearly like a word, else ''."""
        similar = difflib.get_close_matches(word.split("=")[0], self.option_names(), 1)
        return f"; did you mean {similar[0]}?" if similar else ""

    def option_names(self):
        """All options, those of sub-commands among them, a list."""
        names = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    names += parser.option_names()
        return names

    def error(self, message):
        raise UserError(f"{message} (--help lists every option)")


# Options of RunArgs by what they are about, in the order of --help. Those that a script declares itself come before.
GROUPS = {
    "model and problems": (
        *("model", "data", "eval_data", "system_prompt", "chat_template_kwargs"),
        *("max_prompt_length", "max_completion_length"),
    ),
    "sampling and optimizer": (
        *("temperature", "learning_rate", "lr_below", "train_blocks"),
        *("weight_decay", "max_grad_norm", "seed"),
    ),
    "evaluation": ("eval_steps", "eval_problems", "eval_samples", "eval_temperature"),
    "grading": ("reward", "grade_timeout", "max_grader_errors"),
    "run folder": ("output_dir", "overwrite", "save_steps", "save_total_limit", "report_to"),
    "memory and speed": (
        *("device", "dtype", "max_rollout_tokens", "micro_batch_tokens"),
        *("gradient_checkpointing", "optimizer_device"),
    ),
}


def parse(Args, EMBEDDED, argv=None):
    """Command line -> Args. EMBEDDED: the defaults that replace those of Args when the embedded model runs.

    Raises UserError for unknown options and bad values.
    """
    words = sys.argv[1:] if argv is None else argv
    parser = Parser(
        usage="%(prog)s [OPTION VALUE] ...",
        description=description_of(Args),
        allow_abbrev=False,
    )
    parser.trains = True
    fields = {field.name: field for field in dataclasses.fields(Args)}
    own = [name for name in fields if name in vars(Args)["__annotations__"]]
    groups = {"of this script": own} | GROUPS
    added = set()
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name in fields and name not in added:
                add_option(group, fields[name], EMBEDDED)
                added.add(name)
    model = parser.parse_known_args(without_help(words))[0].model
    if is_embedded(model):
        parser.set_defaults(**EMBEDDED)
    return Args(**vars(parser.parse_args(words)))


def description_of(Args):
    """The first paragraph of the docstring of the file that defines Args."""
    text = sys.modules[Args.__module__].__doc__ or ""
    return text.split("\n\n")[0]


def add_option(group, field, EMBEDDED):
    """Add the option that a field of a dataclass stands for."""
    settings = dict(type=value_type(field.type))
    choices = typing.get_args(field.type)
    if typing.get_origin(field.type) is Literal:
        settings = dict(choices=choices)
    elif typing.get_origin(field.type) is list:
        settings = dict(nargs="+")
    elif field.type is bool:
        settings = dict(type=truth, nargs="?", const=True, metavar="BOOL")
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()
    usual = f"(default: {default})"
    if field.name in EMBEDDED:
        usual = f"(default: {EMBEDDED[field.name]}) [embedded model; else {default}]"
    text = f"{field.metadata['help']} {usual}".replace("%", "%%")
    group.add_argument(f"--{field.name}", default=default, help=text, **settings)


def value_type(annotation):
    """The type that reads a value: int of `int`, float of `float | None`."""
    if isinstance(annotation, types.UnionType):
        return typing.get_args(annotation)[0]
    return annotation


def truth(text):
    """'true' or 'false' -> bool; ValueError for anything else."""
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


# For evaluate.py and the analyses, whose command lines hold lists and positional arguments ----------------------------


def add_shared_options(parser, names, suffix="", defaults=True):
    """Add options that mean here what they mean to the training scripts.

    names: which of RunArgs. suffix: goes behind their help. defaults=False: an option that is not given is None.
    """
    for field in dataclasses.fields(RunArgs):
        if field.name in names:
            parser.add_argument(
                f"--{field.name}",
                type=type(field.default),
                default=field.default if defaults else None,
                choices=typing.get_args(field.type) or None,
                help=field.metadata["help"].replace("%", "%%") + suffix,
            )


def check_shared_options(args, names):
    """Raise UserError if one of these options of a namespace has a value that RunArgs refuses."""
    RunArgs(**{name: getattr(args, name) for name in names})


# What every analysis that samples answers shares with the training scripts.
ASKING = (
    "system_prompt",
    "chat_template_kwargs",
    "max_prompt_length",
    "max_completion_length",
    "temperature",
    "max_rollout_tokens",
    "device",
    "dtype",
    "seed",
)


def analysis_parser(docstring):
    """A parser described by the first line of a script's docstring."""
    return Parser(
        description=docstring.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def parse_for_models(parser, argv, models_of, EMBEDDED, shared):
    """Command line -> namespace. Raises UserError for what cannot be understood or is out of bounds.

    argv: a list of words, None for those that the script was called with. models_of: a function, namespace -> the
    models that it names. EMBEDDED: the defaults if all of them are embedded ones. shared: the names that
    `add_shared_options` was given.
    """
    words = sys.argv[1:] if argv is None else argv
    models = models_of(parser.parse_known_args(without_help(words))[0])
    if all(is_embedded(model) for model in models):
        parser.set_defaults(**EMBEDDED)
    args = parser.parse_args(words)
    check_shared_options(args, shared)
    return args


def refuse_below(parser, args, lowest):
    """Raise UserError for an option below its lowest value, or not finite. lowest: by name. An option that is not
    there, or is None, is passed over."""
    for name, low in lowest.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value < math.inf:
            parser.error(f"--{name} {value}: must be {low} or more")
