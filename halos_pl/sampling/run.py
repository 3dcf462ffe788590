"""Fills a file with samples, by either engine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from halos_pl.common.files import check_target
from halos_pl.common.messages import counted, plain
from halos_pl.common.progress import Progress
from halos_pl.data.messages import is_blank
from halos_pl.data.prompt_files import (
    LOGPROB,
    SAME_TOKENS,
    SEED,
    TOKEN_LOGPROBS,
    PromptRow,
    kept_columns,
    left_out,
    read_prompt_rows,
    say_convention,
)
from halos_pl.data.prompts import TextPrompts
from halos_pl.data.special import SpecialTokens
from halos_pl.endpoint.exchange import EndpointError
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.sampling.engine import Engine, Sampled, SamplingSettings
from halos_pl.sampling.local import TransformersEngine
from halos_pl.sampling.remote import EndpointEngine, named_server
from halos_pl.sampling.sample_file import SampleFile
from halos_pl.training.checkpoint_manifest import file_digest
from halos_pl.training.named_model import named_model

#: Number of completions in a batch.
BATCH_SIZE = 16


def sample_file(
    model: str,
    *,
    prompts: str,
    n: int,
    out: str | None,
    prompt_column: str | None,
    engine: Literal["transformers", "endpoint"],
    endpoint: EndpointSettings | None,
    text_prompts: TextPrompts | None,
    chat_template: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    one_per_row: bool,
    logprobs: bool,
    batch_size: int | None,
    seed: int,
    control: str,
    special_tokens_in_text: SpecialTokens | None,
    ckpt_path: str | None,
    skip_failed: bool,
    overwrite: bool,
) -> None:
    """Samples completions of the prompts in a file; for the arguments see :func:`halos_pl.sampling.sample.sample`.

    Raises:
        ValueError: An argument, a prompt or the model is unusable.
        OSError: A file or the server cannot be used.
    """
    sampling = SamplingSettings(n, max_new_tokens, temperature, top_p, seed)
    sampling.check(batch_size)
    local = {
        "chat_template": chat_template,
        "control": control,
        "special_tokens_in_text": special_tokens_in_text,
        "ckpt_path": ckpt_path,
        "text_prompts": None if text_prompts == "chat" else text_prompts,
        "batch_size": batch_size,
    }
    server = named_server(model, engine, endpoint, local, {"skip_failed": skip_failed})
    batch_size = batch_size or BATCH_SIZE
    path = Path(prompts)
    read_prompt_rows(path, text_prompts or "chat", prompt_column)  # to fail before the model is loaded
    target = Path(out) if out else path.with_suffix(".completions.jsonl")
    if target.exists() and target.samefile(path):
        raise FileExistsError(f"--out {target} is the file with the prompts, which would be lost; name another file")
    check_target(target)
    settings: dict[str, Any] = {"engine": engine, "prompts": file_digest(path), "prompt_column": prompt_column}
    settings |= {**vars(sampling), "one_per_row": one_per_row, "logprobs": logprobs}
    if server is None:
        named = named_model(model, ckpt_path, chat_template)
        text = named.text_settings(text_prompts=text_prompts, special_tokens_in_text=special_tokens_in_text)
        settings |= {"text_prompts": text["text_prompts"], "chat_template": named.chat_template, "control": control}
        special = text["special_tokens_in_text"]
        settings |= {"special_tokens_in_text": special, "batch_size": batch_size}
        rows = read_prompt_rows(path, text["text_prompts"], prompt_column)
        say_convention(rows, text["text_prompts"], named.tokenizer())
    else:
        settings |= {"model": server.model, "endpoint.extra_body": server.extra_body}
        rows = read_prompt_rows(path, "chat", prompt_column)
    file = SampleFile(target, settings, n if one_per_row else 1, overwrite=overwrite, may_lack=skip_failed)
    how: dict[str, Any] = {"control": control, "batch_size": batch_size, "together": not one_per_row}
    replies = target.with_name(f"{target.name}.transcripts.jsonl")
    source: Engine
    if server is None:
        source = TransformersEngine(named, rows, sampling, special_tokens_in_text=special, **how)
    else:
        source = EndpointEngine(
            server, rows, sampling, logprobs=logprobs, transcripts=None if file.is_stream else replies
        )
    file.begin(source.load())
    if file.complete:
        replies.unlink(missing_ok=True)
        without = f", without {counted(len(file.skipped), 'prompt')} that failed" if file.skipped else ""
        anew = "; --overwrite true replaces only the file of another command" if overwrite else ""
        print(f"halos: {target} is complete: it contains the completions of this command{without}{anew}")
        return
    if names := left_out(rows, prompt_column):
        print(plain(f"halos: columns of {path} that are not copied: {names}"))
    skipped = _fill(file, source, rows, sampling, one_per_row, logprobs, skip_failed)
    texts = [text for row in file.rows() for text in (row.get("completions") or [row["completion"]])]
    file.finish(model=model, skipped=skipped)
    replies.unlink(missing_ok=True)
    if line := source.summary():
        print(f"halos: {line}")
    if blank := sum(map(is_blank, texts)):
        print(f"halos: empty completions: {blank} of {len(texts)}")
    without = f", without {counted(len(skipped), 'prompt')} that failed" if skipped else ""
    print(f"halos: completions of {counted(len(rows) - len(skipped), 'prompt')} are in {target}{without}")


def _fill(
    file: SampleFile,
    engine: Engine,
    rows: Sequence[PromptRow],
    sampling: SamplingSettings,
    one_per_row: bool,
    logprobs: bool,
    skip_failed: bool,
) -> list[str]:
    """Samples and writes all rows that are missing; returns the places of prompts that failed.

    Raises:
        EndpointError: Prompts failed, and they are not to be skipped.
    """
    done = {i for i, row in enumerate(rows) if row.number in file.done}
    if done:
        print(f"halos: resumes {file.part}, which has completions of {len(done)} of {counted(len(rows), 'prompt')}")
    failed: dict[str, EndpointError] = {}
    tokens, began = 0, time.monotonic()
    try:
        with Progress(len(rows), "sampling, in prompts", done=len(done)) as progress:
            for i, outcome in engine.sample(done):
                if isinstance(outcome, EndpointError):
                    failed[rows[i].place] = outcome
                    continue
                file.add(rows[i].number, _columns(rows[i], outcome, one_per_row, logprobs))
                tokens += sum(each.tokens or 0 for each in outcome)
                progress.advance(note=f"{tokens / max(time.monotonic() - began, 1e-9):.0f} tokens/s")
    except BaseException:
        kept = "nothing is kept" if file.is_stream else f"those are in {file.part}, and the same command resumes"
        print(
            f"halos: stopped after completions of {len(file.done)} of {counted(len(rows), 'prompt')}; {kept}",
            file=sys.stderr,
        )
        raise
    finally:
        if sys.exc_info()[0] is not None:
            file.close()
    if failed and not skip_failed:
        file.close()
        place, error = next(iter(failed.items()))
        hint = "; if the server gives none, set --logprobs false" if "log-prob" in str(error) else ""
        raise EndpointError(
            f"{place}: {error}{hint} ({counted(len(failed), 'prompt')} failed); the same command tries again, and"
            " --skip_failed true leaves them out"
        )
    spent = time.monotonic() - began
    if tokens:
        print(f"halos: {tokens:,} tokens in {spent:.0f} s ({tokens / spent:.0f} tokens/s)")
    return list(failed)


def _columns(row: PromptRow, samples: list[Sampled], one_per_row: bool, logprobs: bool) -> list[dict[str, Any]]:
    """The rows of a prompt."""
    kept = kept_columns(row.columns) | {"prompt": row.prompt}
    values = []
    for each in samples:
        value: dict[str, Any] = {"finished": each.finished}
        if each.seed is not None:
            value[SEED] = each.seed
        if each.same_tokens is not None:
            value[SAME_TOKENS] = each.same_tokens
        if logprobs and each.logprobs is not None:
            value |= {LOGPROB: sum(each.logprobs), TOKEN_LOGPROBS: each.logprobs}
        values.append(value)
    if one_per_row:
        return [kept | {"completion": each.text} | value for each, value in zip(samples, values, strict=True)]
    names = [name for name in values[0] if all(name in value for value in values)]
    lists = {name: [value[name] for value in values] for name in names}
    return [kept | {"completions": [each.text for each in samples]} | lists]
