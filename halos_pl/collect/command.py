"""``halos collect``: checks the options, loads the model, and serves the page."""

from __future__ import annotations

import errno
import importlib.util
import ipaddress
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from halos_pl.endpoint.settings import EndpointSettings

if TYPE_CHECKING:
    from halos_pl.collect.access import Access
    from halos_pl.collect.conversations import Conversations
    from halos_pl.collect.engine import Engine
    from halos_pl.collect.gallery import Gallery


def collect(
    model: str,
    *,
    out: str = "feedback.jsonl",
    kind: Literal["thumbs", "choices"] = "thumbs",
    readonly: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
    password: str | None = None,
    system: str = "",
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 1.0,
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
        out: JSON lines that halos fit reads; new rows are appended.
        kind: thumbs (an answer is good or bad: prompt, completion, label) or choices (one of two answers is better:
            prompt, chosen, rejected).
        readonly: whether to show collected feedback instead; no model is loaded.
        host: address to listen on. Other machines reach the page only under an address other than localhost.
        port: port to listen on; 0 takes a free one.
        password: env:NAME or file:PATH, the environment variable or file with a password of at least 8 characters;
            required for addresses other than localhost.
        system: system message of every conversation.
        max_new_tokens: maximum length of an answer, in tokens.
        temperature: sampling temperature; 0 takes the most likely token.
        top_p: total probability of the most likely tokens to sample from.
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
    from halos_pl.collect.access import Access, password_of
    from halos_pl.collect.conversations import Conversations
    from halos_pl.collect.feedback_file import FeedbackFile
    from halos_pl.collect.gallery import Gallery
    from halos_pl.common.messages import counted
    from halos_pl.data.example import DataError
    from halos_pl.policy.sampling import check_sampling

    refuse_missing_packages()
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    check_sampling(**sampling, **({} if seed is None else {"seed": seed}))
    if engine == "transformers" and endpoint is not None:
        raise DataError("endpoint.url is for --engine endpoint; set that, or remove the setting")
    if kind == "choices" and temperature == 0:
        raise DataError("--kind choices needs a temperature above 0: otherwise both answers are the same")
    secret = None if password is None else password_of(password)
    listener = bound(host, port)
    try:
        address, is_local = address_of(listener)
        if not is_local and secret is None:
            raise DataError(
                f"--host {host} can be reached from other machines; set --password env:NAME or file:PATH, or use an"
                " SSH tunnel to 127.0.0.1"
            )
        access = Access(
            secret,
            # A page with a password is safe under any name.
            frozenset(("localhost", "127.0.0.1", "::1", str(listener.getsockname()[0]))) if secret is None else None,
            f"halos_{listener.getsockname()[1]}",
        )
        path = Path(model if readonly and model.endswith(".jsonl") else out)
        if readonly:
            path.open("rb").close()
            _serve(listener, access, Gallery(path), path.name, f"showing {path} on {address}")
            return
        file = FeedbackFile(path, kind)
        try:
            if engine == "endpoint":
                answering = _endpoint_engine(model, endpoint, sampling)
            else:
                answering = _local_engine(model, ckpt_path, chat_template, special_tokens_in_text, sampling)
            conversations = Conversations(answering, file, system, seed)
            greeting = f"collecting {kind} into {path} ({counted(file.rows, 'row')} so far) on {address}"
            try:
                _serve(listener, access, Gallery(path), model, greeting, conversations)
            finally:
                conversations.close()
                print(f"halos: {path} has {counted(file.rows, 'row')}")
        finally:
            file.close()
    finally:
        listener.close()


def refuse_missing_packages() -> None:
    """Refuses to start without the web server.

    Raises:
        DataError: names the missing packages.
    """
    from halos_pl.data.example import DataError

    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(f"halos collect needs {' and '.join(missing)}; run pip install 'halos_pl[collect]'")


def bound(host: str, port: int) -> socket.socket:
    """A socket with this address. It refuses connections until the server listens.

    Raises:
        DataError: the address does not exist, or is in use.
    """
    from halos_pl.data.example import DataError

    if not 0 <= port < 65536:
        raise DataError(f"--port is {port}; it must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise DataError(f"--host {host} is no address of this machine ({error.strerror})") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise DataError(f"--host {host} is no address of this machine") from error
        raise DataError(
            f"--port {port} of {host}: {(error.strerror or str(error)).lower()}; choose another port, or 0 for a free"
            " one"
        ) from error
    return listener


def address_of(listener: socket.socket) -> tuple[str, bool]:
    """The URL of a socket, and whether only this machine can reach it."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}", ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _local_engine(
    model: str,
    ckpt_path: str | None,
    chat_template: str | None,
    special_tokens_in_text: Any,
    sampling: dict[str, Any],
) -> Engine:
    """A model in this process; faults are reported before weights are read."""
    from halos_pl.collect.local import LocalEngine
    from halos_pl.data.example import DataError
    from halos_pl.training.named_model import named_model

    named = named_model(model, ckpt_path, chat_template)
    if not named.tokenizer().chat_template:
        raise DataError(f"{model} has no chat template, so it is no chat model; name one with --chat_template")
    special = named.text_settings(special_tokens_in_text=special_tokens_in_text)["special_tokens_in_text"]
    return LocalEngine(named, sampling, special)


def _endpoint_engine(model: str, endpoint: EndpointSettings | None, sampling: dict[str, Any]) -> Engine:
    """A model at a server, once the server has answered."""
    from halos_pl.collect.remote import EndpointEngine
    from halos_pl.data.example import DataError

    if endpoint is None:
        raise DataError("--engine endpoint needs --endpoint.url URL")
    if endpoint.model not in ("", model):
        raise DataError(f"endpoint.model is {endpoint.model}, but MODEL is {model}; name the model once")
    return EndpointEngine(replace(endpoint, model=model), sampling)


def _serve(
    listener: socket.socket,
    access: Access,
    gallery: Gallery,
    title: str,
    greeting: str,
    conversations: Conversations | None = None,
) -> None:
    """Serves the page until a signal ends it."""
    from uvicorn import Config, Server

    from halos_pl.collect.app import Site, make_app

    # No log of requests; streams that are open when the server stops are cut.
    config = Config(
        make_app(Site(access, conversations, gallery, title)),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
        lifespan="off",
    )
    listener.listen(128)  # from here on a browser waits, instead of being refused
    print(f"halos: {greeting}; Ctrl-C ends", flush=True)
    Server(config).run(sockets=[listener])
