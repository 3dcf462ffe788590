"""``halos label``: scores of sampled completions, as feedback that ``halos fit`` reads."""

from __future__ import annotations

from typing import Literal

from halos_pl.endpoint.settings import EndpointSettings


def label(
    file: str,
    *,
    by: str | list[str],
    out: str | None = None,
    form: Literal["scored", "binary", "pairs"] = "scored",
    threshold: float | list[float] | None = None,
    pairs: Literal["best_worst", "random"] | None = None,
    min_gap: float | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    text_prompts: Literal["plain", "chat"] | None = None,
    endpoint: EndpointSettings | None = None,
    skip_failed: bool = False,
    keep_empty: bool = False,
    overwrite: bool = False,
) -> None:
    """Label the completions in a file of halos sample; executes the code of a rule.

    Labels are written as they are made; after a kill, the same command resumes. A file of labels is bound to the
    content of the samples and to the rule's file or the model's weights.

    Args:
        file: JSON lines with "prompt", and "completions" or "completion".
        by: 'rule: path/to/file.py:function', where function(answer, row) returns a number from 0 to 1;
            'reward: FOLDER', a sequence classifier with one label, in a folder or on the hub; or 'judge: NAME', a
            shipped judge or a YAML file with a rubric, at an endpoint: its grades, or a completion's mean preference
            over the prompt's others, each two in both orders. For a list of these, the share of their votes is the
            score.
        out: JSON lines to write; default: beside the file, ending in .FORM.jsonl.
        form: scored adds "score", or "scores" for a list of completions; binary writes a row per completion with
            "label"; pairs writes "chosen" and "rejected".
        threshold: score from which a completion is desirable, for --form binary. Rewards and grades need one, and in
            a vote it is theirs alone: rules and comparisons vote from 0.5 on. Several of them need a list with a number
            for each, in the order of --by. Without any of them, it replaces the 0.5.
        pairs: best_worst (default) pairs the best completion of a prompt with the worst; random draws two of unequal
            score.
        min_gap: smallest difference of scores within a pair; default: 0.
        seed: seed of the random pairs; default: 0.
        batch_size: number of completions in a pass of a reward model; default: 16.
        text_prompts: how a reward model gets prompts that are plain text: plain (default), which leaves them unchanged,
            or chat, as a user message.
        endpoint: the server of a judge.
        skip_failed: whether completions get no verdict if a judge's server gives no usable reply about them; by
            default, the command stops there.
        keep_empty: whether to label empty completions too, which halos fit refuses; by default they are left out.
        overwrite: whether to replace a file from another command.
    """
    arguments = dict(locals())
    # Imported here: it loads torch and transformers, for which --help should not wait.
    from halos_pl.labelling.run import label_file

    label_file(**arguments)
