"""The text of ``halos --help`` and the error about an unknown command; imports nothing heavy."""

from __future__ import annotations

import difflib

#: The commands of Lightning's Trainer.
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
#: A line about each command, kept here because importing the commands takes ten seconds.
COMMANDS = {
    "fit": "Train a model on human feedback; writes a run's folder.",
    "validate": "Measure a run's model on data.validation.",
    "test": "Measure a run's model on data.test, with AUROC and the KL divergence.",
    "predict": "Write log-probs, reward, outcome and value of each row of data.predict.",
    "export": "Write a run's model as a Hugging Face folder.",
    "sample": "Sample completions of prompts, here or at a server.",
    "chat": "Talk to a model in the terminal.",
    "label": "Label sampled completions by a rule, a reward model or a judge.",
    "collect": "Collect human feedback on a web page.",
    "evaluate": "Measure a run, or any model, per example: held-out feedback, answers, benchmarks.",
    "compare": "Compare two evaluations example by example.",
    "judge agreement": "Measure how far a judge agrees with people.",
    "check": "Check a loss, or a part of one, against the definition of human-aware losses.",
    "prove": "Prove that a value function never falls and is concave on gains, on the whole real line.",
    "verify": "Check a certificate of halos prove, without the prover.",
    "convert": "Turn a config of TRL, LLaMA-Factory or the HALOs code into one of halos fit.",
    "plan": "Show what a run will take: parameters, memory, tokens, the cards that it fits.",
    "objectives": "List the shipped losses with formula, needs and verdict.",
    "new": "Write a skeleton of a plug-in or a loss, with its test.",
    "data inspect": "Show a source of feedback before training on it.",
    "rounds": "Train online, in rounds of sampling, labelling and fitting, with a report.",
    "ablate": "Run a study: arms, seeds, measurements, report.",
    "ablate status": "Show the progress of a study.",
    "ablate report": "Recompute the report of a study, finished or not.",
    "cache": "Show the content and size of the cache.",
    "cache info": "Same as halos cache.",
    "cache clear": "Empty the cache.",
}
EPILOG = """\
halos COMMAND --help lists the options of a command; halos fit --model.value_function.help Logistic, those of a plug-in.
halos fit --objective kto --data.train FILE trains; halos objectives lists the losses. Later settings win: base.yaml,
then the objective, then the files of --config in order, then all other options. A config is a file or the name of a
shipped one, such as data/shp.
halos fit ... --print_config=comments prints the resolved config with a comment on each setting.

A config that names classes runs code: classes of other packages and files are imported, and trust_remote_code executes
a model's own code. Exit status: 0 for success, 1 for an error, 2 for a wrong command line, 128 + n after signal n (130
after Ctrl-C, 143 after SIGTERM). A fit then saves a checkpoint first, and --ckpt_path last resumes from it; a second
Ctrl-C stops at once."""


def help_page() -> str:
    """The text that ``halos --help`` prints."""
    head = ["usage: halos COMMAND [options]", "", "Align language models with human-aware losses.", "", "commands:"]
    options = ["options:", "  --help     Show this page.", "  --version  Show the version."]
    return "\n".join([*head, *_lines(COMMANDS), "", *options, "", EPILOG])


def group_page(words: list[str]) -> str:
    """The text that ``halos WORD --help`` prints for the first word of several commands; empty for other words."""
    group = _group(words[0])
    if not group or words[1:] not in (["--help"], ["-h"]):
        return ""
    return "\n".join([f"usage: halos {words[0]} COMMAND [options]", "", "commands:", *_lines(group)])


def unknown_command(words: list[str]) -> str:
    """The error about the first words of a command line; empty if they are a command or an option."""
    group = _group(words[0])
    commands = list(group) or list(dict.fromkeys(name.partition(" ")[0] for name in COMMANDS))
    word = " ".join(word for word in words[: 2 if group else 1] if not word.startswith("-"))
    if not word or word in commands:
        return ""
    near = difflib.get_close_matches(word, commands, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return f"no command is named {word!r}{guess}; it takes one of: {', '.join(commands)}"


def _group(word: str) -> dict[str, str]:
    """The commands whose first word is this one; none if it is a command itself."""
    return {} if word in COMMANDS else {name: what for name, what in COMMANDS.items() if name.startswith(f"{word} ")}


def _lines(commands: dict[str, str]) -> list[str]:
    width = max(map(len, commands))
    return [f"  {name:<{width}}  {what}" for name, what in commands.items()]
