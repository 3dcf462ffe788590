"""``halos generate``: samples completions of the prompts in a file, in the format of ``halos fit``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halos_pl.common.files import check_target, part_of, whole
from halos_pl.common.messages import plain
from halos_pl.data.prompt_files import ANSWERS, SAME_TOKENS, PromptRow, read_prompt_rows, say_convention
from halos_pl.data.prompts import TextPrompts
from halos_pl.data.special import SpecialTokens
from halos_pl.data.tokenize import Encoder
from halos_pl.policy.limits import check_prompts
from halos_pl.policy.sampled_text import SampledText, sampled_texts
from halos_pl.policy.sampling import check_sampling, encode_prompts, generate
from halos_pl.training.named_model import named_model


def generate_file(
    model: str,
    *,
    prompts: str,
    prompt_column: str | None = None,
    out: str | None = None,
    text_prompts: TextPrompts | None = None,
    chat_template: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    one_per_row: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    control: str = "",
    special_tokens_in_text: SpecialTokens | None = None,
    ckpt_path: str | None = None,
) -> None:
    """Sample completions of the prompts in a file. The code that a run's config.yaml names is executed.

    Args:
        model: folder of a run, a Hugging Face folder, a folder with a peft adapter, a hub name, or package:NAME.
        prompts: .txt file with one prompt per line, or JSON lines with "prompt", a text or a message list.
        prompt_column: column of JSON lines with the prompt; default: "prompt".
        out: JSON lines to write; default: beside the prompts. Each row has the columns of its prompt's row, "prompt" as
            the model got it (messages if the chat template was applied), and lists of equal length: "completions";
            "finished", whether the model ended each; and "same_tokens", whether training on its text gives the sampled
            tokens (special tokens that the text must not contain are dropped). halos fit reads the rows once a list
            "scores" is added. Until sampling is done, the file's name ends in .part.
        text_prompts: encoding of plain-text prompts: plain (unchanged) or chat (a user message in the chat template);
            default: as the run was trained (data.text_prompts), else plain.
        chat_template: chat template that replaces the model's: a .jinja file, a folder with a tokenizer, chatml, or the
            template itself; default: that of the run's training, else the tokenizer's.
        max_new_tokens: maximum length of a completion, in tokens.
        temperature: temperature of the softmax; 0 always takes the likeliest token.
        top_p: probability mass of the likeliest tokens to sample from.
        num_samples: number of completions per prompt.
        one_per_row: whether to write one row per completion, with "completion", "finished" and "same_tokens"; halos fit
            reads such rows once "label" or "score" is added.
        batch_size: number of completions sampled at a time.
        seed: seed of the sampling.
        control: text between every prompt and its completion; "<|good|>" for a model trained with csft.yaml.
        special_tokens_in_text: treatment of special tokens spelled in a message: refuse those that forge a turn, split
            them into plain text, or allow them; default: as the run was trained, else refuse.
        ckpt_path: checkpoint of a run other than the last: best (from its ModelCheckpoint), or a file.
    """
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "num_samples": num_samples,
        "batch_size": batch_size,
    }
    check_sampling(seed=seed, **sampling)
    path = Path(prompts)
    read_prompt_rows(path, text_prompts or "chat", prompt_column)  # to fail before the model is loaded
    target = Path(out) if out else path.with_suffix(".completions.jsonl")
    if target.exists() and target.samefile(path):
        raise FileExistsError(f"--out {target} is the file with the prompts, which would be lost; name another file")
    check_target(target)
    named = named_model(model, ckpt_path, chat_template)
    text = named.text_settings(text_prompts=text_prompts, special_tokens_in_text=special_tokens_in_text)
    rows = read_prompt_rows(path, text["text_prompts"], prompt_column)
    sampling |= {"control": control, "special_tokens_in_text": text["special_tokens_in_text"]}
    tokenizer = named.tokenizer()
    say_convention(rows, text["text_prompts"], tokenizer)
    stale = sorted({name for row in rows for name in row.columns.keys() & ANSWERS})
    if stale:
        print(f"halos: columns of {plain(path)} that belong to other answers are not copied: {', '.join(stale)}")
    inputs, names = [row.prompt for row in rows], [row.place for row in rows]
    tools = [row.tools for row in rows]
    encoded = encode_prompts(tokenizer, inputs, names, control, text["special_tokens_in_text"], tools)
    encoder = Encoder(tokenizer, text["special_tokens_in_text"])
    policy = named.load()
    check_prompts(policy, tokenizer, encoded, names, max_new_tokens)  # before any sampling
    chunk = 8 * max(1, batch_size // num_samples)
    done = others = 0
    try:
        with whole(target, keep=True) as file:
            # In chunks, so that an interrupted run keeps its samples.
            for at in range(0, len(rows), chunk):
                part = slice(at, at + chunk)
                options: dict[str, Any] = {"seed": seed + at, "names": names[part], "tools": tools[part]}
                samples = generate(policy, tokenizer, inputs[part], **options, **sampling)
                both = list(zip(inputs[part], tools[part], strict=True))
                texts = sampled_texts(encoder, both, samples, control=control, together=not one_per_row)
                others += sum(not text.same_tokens for completions in texts for text in completions)
                for row, completions in zip(rows[part], texts, strict=True):
                    file.writelines(f"{line}\n" for line in _lines(row, completions, one_per_row))
                file.flush()
                done = at + len(samples)
    except BaseException:
        left = f"those of the first {done} are in {part_of(target)}" if done else "none were written"
        print(f"halos: stopped before completions of all {len(rows)} prompts were sampled; {left}", file=sys.stderr)
        raise
    if others:
        print(
            f"halos: training on {others} of {len(rows) * num_samples} completions would not give the sampled tokens"
            f" ({SAME_TOKENS}: false): the tokenizer splits their text differently, or a special token that would forge"
            " a turn was dropped"
        )
    print(f"halos: completions of {len(rows)} prompts are in {target}")


def _lines(row: PromptRow, texts: list[SampledText], one_per_row: bool) -> Iterator[str]:
    """The completions of a prompt as JSON, with the columns of its row."""
    kept = {name: value for name, value in row.columns.items() if name not in ANSWERS} | {"prompt": row.prompt}
    finished, same = [each.finished for each in texts], [each.same_tokens for each in texts]
    rows = [{"completions": [each.text for each in texts], "finished": finished, SAME_TOKENS: same}]
    if one_per_row:
        rows = [{"completion": each.text, "finished": each.finished, SAME_TOKENS: each.same_tokens} for each in texts]
    for columns in rows:
        yield json.dumps(kept | columns, ensure_ascii=False)
