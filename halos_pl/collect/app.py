"""The web application: pages for people, and JSON for the script of the chat page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from jinja2 import Environment, PackageLoader
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from halos_pl.collect.access import Access, Shield
from halos_pl.collect.conversations import Conversation, Conversations
from halos_pl.collect.gallery import Gallery

#: Seconds between two looks at an answer that is being written.
TICK = 0.08
#: Bytes of a request.
LARGEST = 1 << 20
#: Seconds after which a stream without news sends a comment, so that proxies keep it open.
QUIET = 15.0

_STATIC = {"style.css": "text/css", "chat.js": "text/javascript", "icon.svg": "image/svg+xml"}
_SPOKEN = ("waiting", "writing")


@dataclass(frozen=True)
class Site:
    """What the pages are about.

    Attributes:
        access: who may use them.
        conversations: conversations with a model; None for a gallery.
        gallery: rows of the file.
        title: name of the model, or of the file in a gallery.
    """

    access: Access
    conversations: Conversations | None
    gallery: Gallery
    title: str

    @property
    def asks(self) -> bool:
        """Whether people must enter: with a name to chat, or with a password."""
        return self.conversations is not None or self.access.has_password


class _Wrong(Exception):
    """A response other than success to the script."""

    def __init__(self, status: int, error: str) -> None:
        self.status, self.error = status, error


def make_app(site: Site) -> Starlette:
    """The application."""
    templates = Environment(loader=PackageLoader("halos_pl.collect", "page"), autoescape=True)
    page = partial(_page, templates, site)
    routes = [
        Route("/static/{name}", _static),
        Route("/enter", partial(_enter, site, page), methods=["GET", "POST"]),
        Route("/leave", partial(_leave, site), methods=["POST"]),
    ]
    if site.conversations is None:
        routes.append(Route("/", partial(_gallery, site, page)))
    else:
        calls: dict[str, tuple[str, Callable[..., Awaitable[Any]]]] = {
            "/chats": ("POST", _new),
            "/chats/{chat}": ("GET", _show),
            "/chats/{chat}/messages": ("POST", _say),
            "/chats/{chat}/events": ("GET", _events),
            "/chats/{chat}/{turn:int}/again": ("POST", _again),
            "/chats/{chat}/{turn:int}/stop": ("POST", _stop),
            "/chats/{chat}/{turn:int}/verdict": ("POST", _judge),
        }
        routes.append(Route("/", partial(_chat, site, page)))
        routes += [Route(path, partial(_call, site, call), methods=[how]) for path, (how, call) in calls.items()]
    return Starlette(routes=routes, middleware=[Middleware(Shield, access=site.access)])


# Pages -------------------------------------------------------------------------------------------------


def _page(templates: Environment, site: Site, template: str, status: int = 200, /, **values: Any) -> Response:
    text = templates.get_template(template).render(site=site, **values)
    return HTMLResponse(text.encode("utf-8", "replace"), status)  # a row may contain half a surrogate pair


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC:
        return Response("There is no such file.", 404)
    return Response((files("halos_pl.collect") / "page" / name).read_bytes(), media_type=_STATIC[name])


def _session(site: Site, request: Request) -> str | None:
    session: str | None = request.cookies.get(site.access.cookie)
    return session


async def _enter(site: Site, page: Callable[..., Response], request: Request) -> Response:
    if request.method == "GET":
        return page("enter.html.jinja", error="", name="") if site.asks else RedirectResponse("./")
    try:
        fields = parse_qs((await _body(request)).decode("utf-8", "replace"), keep_blank_values=True)
    except _Wrong as wrong:
        return Response(wrong.error, wrong.status)
    name, password = (fields.get(key, [""])[0] for key in ("name", "password"))
    try:
        session = await site.access.enter(name if site.conversations else "reader", password)
    except ValueError as error:
        return page("enter.html.jinja", 403, error=str(error), name=name)
    response = RedirectResponse("./", 303)
    response.set_cookie(site.access.cookie, session, httponly=True, samesite="lax")
    return response


async def _leave(site: Site, request: Request) -> Response:
    site.access.leave(_session(site, request) or "")
    return RedirectResponse("./enter", 303)


async def _chat(site: Site, page: Callable[..., Response], request: Request) -> Response:
    name, conversations = site.access.name(_session(site, request)), site.conversations
    if name is None:
        return RedirectResponse("./enter")
    assert conversations is not None
    engine, file = conversations.engine, conversations.file
    facts = [*engine.model.items(), *engine.sampling.items()]
    return page(
        "chat.html.jinja",
        name=name,
        kind=file.kind,
        rows=file.rows,
        file=file.path.name,
        limit=engine.sampling.get("max_new_tokens"),
        system=conversations.system,
        facts=[(name.replace("_", " "), value) for name, value in facts if value is not None],
    )


async def _gallery(site: Site, page: Callable[..., Response], request: Request) -> Response:
    if site.asks and site.access.name(_session(site, request)) is None:
        return RedirectResponse("./enter")
    number = request.query_params.get("page", "1")
    try:
        content = await run_in_threadpool(site.gallery.page, int(number) if number.isdecimal() else 1)
    except OSError as error:
        return page("gallery.html.jinja", 500, page=None, error=f"{site.gallery.path.name}: {error.strerror}")
    return page("gallery.html.jinja", page=content, error="")


# Calls of the script -----------------------------------------------------------------------------------


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST:
            raise _Wrong(413, "the message is too long")
    return body


async def _call(site: Site, call: Callable[..., Awaitable[Any]], request: Request) -> Response:
    """Runs a call; errors become JSON with an ``error`` for the person."""
    try:
        session, conversations = _session(site, request), site.conversations
        name = site.access.name(session)
        assert conversations is not None
        if session is None or name is None:
            raise _Wrong(401, "the server was restarted; reload the page to enter again")
        arguments: dict[str, Any] = {}
        if request.method == "POST":
            # No form of another web site can send this type.
            if request.headers.get("content-type", "").partition(";")[0] != "application/json":
                raise _Wrong(415, "the request is not JSON")
            try:
                arguments = json.loads(await _body(request))
            except (ValueError, RecursionError):
                raise _Wrong(400, "the request is not JSON") from None
            if not isinstance(arguments, dict):
                raise _Wrong(400, "the request is not a JSON object")
        if call is _new:
            chat = conversations.new(session, name)
        elif (known := conversations.find(request.path_params["chat"], session)) is not None:
            chat = known
        else:
            raise _Wrong(404, "this conversation is gone, because the server was restarted")
        try:
            answer = await call(conversations, chat, request.path_params.get("turn", 0), arguments)
        except OSError as error:
            raise _Wrong(507, f"not recorded: {error.strerror or error}") from error
        except ValueError as error:
            raise _Wrong(409, str(error)) from error
        return answer if isinstance(answer, Response) else JSONResponse(conversations.shown(chat))
    except _Wrong as wrong:
        return JSONResponse({"error": wrong.error}, wrong.status)


async def _new(conversations: Conversations, chat: Conversation, turn: int, arguments: dict[str, Any]) -> None:
    """A new conversation, made by the caller."""


async def _show(conversations: Conversations, chat: Conversation, turn: int, arguments: dict[str, Any]) -> None:
    """The conversation, shown by the caller."""


async def _say(conversations: Conversations, chat: Conversation, turn: int, arguments: dict[str, Any]) -> None:
    text = arguments.get("text")
    if not isinstance(text, str):
        raise _Wrong(400, "the message is not text")
    await run_in_threadpool(conversations.say, chat, text)


async def _again(conversations: Conversations, chat: Conversation, turn: int, arguments: dict[str, Any]) -> None:
    await run_in_threadpool(conversations.sample_again, chat, turn)


async def _stop(conversations: Conversations, chat: Conversation, turn: int, arguments: dict[str, Any]) -> None:
    conversations.stop(chat, turn)


async def _judge(conversations: Conversations, chat: Conversation, turn: int, arguments: dict[str, Any]) -> None:
    await run_in_threadpool(conversations.judge, chat, turn, arguments.get("value"))


async def _events(conversations: Conversations, chat: Conversation, turn: int, arguments: dict[str, Any]) -> Response:
    """The last turn of a conversation whenever it changes, as server-sent events, until it is answered."""

    async def events() -> AsyncIterator[str]:
        last, quiet = "", 0.0
        while True:
            shown = conversations.shown(chat)
            turns = shown["turns"]
            if (news := json.dumps(turns[-1:])) != last:
                last, quiet = news, 0.0
                yield f"data: {news}\n\n"
            elif (quiet := quiet + TICK) > QUIET:
                quiet = 0.0
                yield ": \n\n"
            if not turns or turns[-1]["status"] not in _SPOKEN or conversations.closed:
                yield "event: end\ndata: \n\n"
                return
            await asyncio.sleep(TICK)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
