"""``halos sample``: completions of the prompts in a file, in the format of ``halos fit``."""

from __future__ import annotations

from typing import Literal

from halos_pl.endpoint.settings import EndpointSettings


def sample(
    model: str,
    *,
    prompts: str,
    n: int = 1,
    out: str | None = None,
    prompt_column: str | None = None,
    engine: Literal["transformers", "endpoint"] = "transformers",
    endpoint: EndpointSettings | None = None,
    text_prompts: Literal["plain", "chat"] | None = None,
    chat_template: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    one_per_row: bool = False,
    logprobs: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
    control: str = "",
    special_tokens_in_text: Literal["refuse", "split", "allow"] | None = None,
    ckpt_path: str | None = None,
    skip_failed: bool = False,
    overwrite: bool = False,
) -> None:
    """Sample completions of the prompts in a file. The code that a run's config.yaml names is executed.

    Rows are written as they finish. After a kill, the same command resumes and gives the same completions as an
    uninterrupted one. Nothing else may resume the file: its settings are recorded beside it.

    Args:
        model: folder of a run, a Hugging Face folder, a folder with a peft adapter, a hub name, or package:NAME; for
            --engine endpoint, the name of the model at the server.
        prompts: .txt file with one prompt per line, or JSON lines with "prompt", a text or a message list.
        n: number of completions per prompt.
        out: JSON lines to write; default: beside the prompts. Each row has the columns of its prompt's row, "prompt" as
            the model got it (messages if the chat template was applied), its line as "prompt_row", and lists of equal
            length: "completions"; "finished", whether the model ended each; "seed"; "logprob", the sum of its tokens'
            log-probs in nats at temperature 1, and "token_logprobs"; and "same_tokens", whether training on its text
            gives the sampled tokens (special tokens that the text must not contain are dropped). halos fit reads the
            rows once a list "scores" is added, and halos label adds it. Until sampling is done, the file's name ends in
            .part.
        prompt_column: column of JSON lines with the prompt; default: "prompt".
        engine: transformers runs the model in this process, on one device; endpoint sends requests to a server.
        endpoint: the server of --engine endpoint.
        text_prompts: encoding of plain-text prompts: plain (unchanged) or chat (a user message in the chat template);
            default: as the run was trained (data.text_prompts), else plain; always chat for --engine endpoint.
        chat_template: chat template that replaces the model's: a .jinja file, a folder with a tokenizer, chatml, or the
            template itself; default: that of the run's training, else the tokenizer's.
        max_new_tokens: maximum length of a completion, in tokens.
        temperature: temperature of the softmax; 0 always takes the likeliest token.
        top_p: probability mass of the likeliest tokens to sample from.
        one_per_row: whether to write one row per completion, with "completion" and single values; halos fit reads such
            rows once "label" or "score" is added.
        logprobs: whether to write log-probs; --engine endpoint asks the server for them.
        batch_size: number of completions sampled at a time by --engine transformers; default: 16.
        seed: seed of the sampling. Each completion has its own, derived from this one, the prompt's line and its index.
        control: text between every prompt and its completion; "<|good|>" for a model trained with csft.yaml.
        special_tokens_in_text: treatment of special tokens spelled in a message: refuse those that forge a turn, split
            them into plain text, or allow them; default: as the run was trained, else refuse.
        ckpt_path: checkpoint of a run other than the last: best (from its ModelCheckpoint), or a file.
        skip_failed: whether to leave out prompts for which a server gives no usable reply.
        overwrite: whether to replace a file from another command; a complete file of this one stays.
    """
    arguments = dict(locals())
    # Imported here: it loads torch and transformers, for which --help should not wait.
    from halos_pl.sampling.run import sample_file

    sample_file(**arguments)
