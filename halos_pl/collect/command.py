"""``halos collect``: checks the options, loads the model, and serves the page."""

from __future__ import annotations

import importlib.util
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from halos_pl.endpoint.settings import EndpointSettings

if TYPE_CHECKING:
    from halos_pl.collect.engine import Engine


def collect(
    model: str,
    *,
    out: str | None = None,
    kind: Literal["thumbs", "choices"] | None = None,
    readonly: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
    password: str | None = None,
    system: str = "",
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    engine: Literal["transformers", "endpoint"] = "transformers",
    endpoint: EndpointSettings | None = None,
    chat_template: str | None = None,
    special_tokens_in_text: Literal["refuse", "split", "allow"] | None = None,
    ckpt_path: str | None = None,
) -> None:
    """Collect feedback on a web page; executes the code that a run's config.yaml names.

    People chat with the model, and judge its answers. Each click is on the disk before the page confirms it.

    Args:
        model: the folder of a run, a Hugging Face folder, a folder with a peft adapter, a hub name, or package:NAME;
            for --engine endpoint, the name of the model at the server; with --readonly, the file to show.
        out: JSON lines that halos fit reads; new rows are appended; default: feedback.jsonl.
        kind: thumbs (default; an answer is good or bad: prompt, completion, label) or choices (one of two answers is
            better: prompt, chosen, rejected).
        readonly: whether to show collected feedback instead; no model is loaded.
        host: address to listen on. Other machines reach the page only under an address other than localhost.
        port: port to listen on; 0 takes a free one.
        password: env:NAME or file:PATH, the environment variable or file with a password of at least 8 characters;
            required for addresses other than localhost.
        system: system message of every conversation.
        max_new_tokens: maximum length of an answer, in tokens; default: 512.
        temperature: sampling temperature; 0 takes the most likely token; default: 0.7.
        top_p: total probability of the most likely tokens to sample from; default: 1.
        seed: seed of the first answer, the next ones count up; default: a random seed for each answer.
        engine: transformers runs the model in this process; endpoint sends requests to a server.
        endpoint: the server of --engine endpoint, with OpenAI's chat completions API.
        chat_template: chat template that replaces the model's: a .jinja file, a folder with a tokenizer, chatml, or the
            template itself; default: that of the run's training, else the tokenizer's.
        special_tokens_in_text: treatment of special tokens spelled in a message: refuse those that forge a turn, split
            them into plain text, or allow them; default: as the run was trained, else refuse.
        ckpt_path: checkpoint of a run other than the last: best (from its ModelCheckpoint), or a file.
    """
    # Imported here: they load torch and transformers, for which --help should not wait.
    from halos_pl.collect.access import password_of
    from halos_pl.collect.conversations import Conversations, opening
    from halos_pl.collect.feedback_file import FeedbackFile, refuse_unreadable
    from halos_pl.collect.gallery import check_shown
    from halos_pl.collect.remote import EndpointEngine
    from halos_pl.collect.server import access_to, bound, serve
    from halos_pl.common.messages import counted
    from halos_pl.data.example import DataError
    from halos_pl.policy.sampling import check_sampling
    from halos_pl.sampling.remote import named_server

    _refuse_missing_packages()
    local = {"chat_template": chat_template, "special_tokens_in_text": special_tokens_in_text, "ckpt_path": ckpt_path}
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    if readonly:
        given = {"out": out, "kind": kind, "system": system, "seed": seed, "endpoint": endpoint, **sampling, **local}
        given["engine"] = None if engine == "transformers" else engine
        if unused := [name for name, value in given.items() if value not in ("", None)]:
            raise DataError(
                f"--{unused[0]} has no effect with --readonly true, which only shows MODEL, a file; omit it"
            )
    for name, default in (("max_new_tokens", 512), ("temperature", 0.7), ("top_p", 1.0)):
        sampling[name] = default if sampling[name] is None else sampling[name]
    check_sampling(**sampling, seed=seed)
    server = named_server(model, engine, endpoint, local)
    if seed is not None and server and "seed" in (server.extra_body or {}):
        raise DataError("--seed has no effect, as endpoint.extra_body removes it; omit one of them")
    kind = kind or "thumbs"
    if kind == "choices" and sampling["temperature"] == 0:
        raise DataError("--kind choices needs a temperature above 0: otherwise both answers are the same")
    hello = [*opening(system), {"role": "user", "content": "Hello"}]
    refuse_unreadable({"prompt": hello, "completion": "Hello", "label": True})
    secret = None if password is None else password_of(password)
    with closing(bound(host, port)) as listener:
        access = access_to(listener, host, secret)
        if readonly:
            path = Path(model)
            if path.is_dir():
                raise DataError(f"{model} is a folder; --readonly true shows a file that halos collect has written")
            check_shown(path)
            serve(listener, access, path, path.name, f"showing {path}")
            return
        path = Path(out or "feedback.jsonl")
        with closing(FeedbackFile(path, kind)) as file:
            if server:
                answering: Engine = EndpointEngine(server, sampling)
            else:
                answering = _local_engine(model, ckpt_path, chat_template, special_tokens_in_text, hello, sampling)
            with closing(Conversations(answering, file, system, seed)) as conversations:
                rows = counted(file.rows, "row")
                serve(listener, access, path, model, f"collecting {kind} into {path} ({rows} so far)", conversations)


def _refuse_missing_packages() -> None:
    """Refuses to start without the web server.

    Raises:
        DataError: names the missing packages.
    """
    from halos_pl.data.example import DataError

    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(f"halos collect needs {' and '.join(missing)}; run pip install 'halos_pl[collect]'")


def _local_engine(
    model: str,
    ckpt_path: str | None,
    chat_template: str | None,
    special_tokens_in_text: Any,
    hello: list[dict[str, Any]],
    sampling: dict[str, Any],
) -> Engine:
    """A model in this process; faults are reported before weights are read."""
    from halos_pl.collect.local import LocalEngine
    from halos_pl.data.example import DataError
    from halos_pl.policy.sampling import encode_prompts
    from halos_pl.training.named_model import named_model

    named = named_model(model, ckpt_path, chat_template)
    tokenizer = named.tokenizer()
    if not tokenizer.chat_template:
        raise DataError(f"{model} has no chat template, so it is no chat model; name one with --chat_template")
    special = named.text_settings(special_tokens_in_text=special_tokens_in_text)["special_tokens_in_text"]
    encode_prompts(tokenizer, [hello], ["--system" if len(hello) > 1 else model], "", special)
    return LocalEngine(named, tokenizer, sampling, special)
