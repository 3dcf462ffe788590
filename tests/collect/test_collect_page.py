"""The page of ``halos collect``, as its script and a form of a browser use it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from collect_page import FakeEngine, close, make_site
from run_halos import write_jsonl

pytest.importorskip("starlette", reason="starlette is not installed (extra: collect)")

from starlette.testclient import TestClient

from halos_pl.collect.app import make_app

LIMIT = 10.0  # seconds


class Person:
    """Someone on the page, with a browser of their own."""

    def __init__(self, site: Any, name: str = "Ada", password: str = "") -> None:
        self.browser = TestClient(make_app(site), follow_redirects=False)
        self.chat = ""
        self.entered = self.browser.post("/enter", data={"name": name, "password": password})

    def call(self, path: str, status: int = 200, **arguments: Any) -> dict[str, Any]:
        response = self.browser.post(path, json=arguments)
        assert response.status_code == status, response.text
        return response.json()  # type: ignore[no-any-return]

    def say(self, text: str, status: int = 200) -> dict[str, Any]:
        self.chat = self.chat or self.call("/chats")["id"]
        return self.call(f"/chats/{self.chat}/messages", status, text=text)

    def do(self, turn: int, what: str, status: int = 200, **arguments: Any) -> dict[str, Any]:
        return self.call(f"/chats/{self.chat}/{turn}/{what}", status, **arguments)

    def seen(self) -> list[dict[str, Any]]:
        response = self.browser.get(f"/chats/{self.chat}")
        assert response.status_code == 200
        return response.json()["turns"]  # type: ignore[no-any-return]

    def until(self, status: str = "done") -> dict[str, Any]:
        """The last turn, once it has this status."""
        end = time.monotonic() + LIMIT
        while (turn := self.seen()[-1])["status"] != status:
            assert time.monotonic() < end, turn
            time.sleep(0.005)
        return turn


class Setting:
    """Sites that a test opens, closed after it."""

    def __init__(self, folder: Path) -> None:
        self.path, self.engine, self._sites = folder / "a.jsonl", FakeEngine(), list[Any]()

    def site(self, kind: str = "thumbs", **options: Any) -> Any:
        self._sites.append(make_site(self.path, kind, self.engine, **options))
        return self._sites[-1]

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def close(self) -> None:
        self.engine.gate.set()
        for site in self._sites:
            close(site)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Setting]:
    setting = Setting(tmp_path)
    yield setting
    setting.close()


def test_thumbs(here: Setting) -> None:
    ada = Person(here.site(system="Be brief.", seed=5), "  Ada\tLovelace ")
    ada.say("Hello?\r\n ")
    assert ada.until()["answers"] == [{"text": "answer to Hello?", "finished": True}]
    assert here.rows() == []
    shown = ada.do(0, "verdict", value=True)
    assert shown["recorded"] == 1
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    (row,) = here.rows()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row.pop("time"))
    row_id = row.pop("id")
    assert row == {
        "prompt": prompt,
        "completion": "answer to Hello?",
        "label": True,
        "finished": True,
        "same_tokens": True,
        "annotator": "Ada Lovelace",
        "model": here.engine.model,
        "sampling": here.engine.sampling,
        "seed": 5,
        "chat": ada.chat,
        "turn": 0,
    }
    first = ada.seen()[0]["time"]
    ada.do(0, "verdict", value=False)  # a correction
    (row,) = here.rows()
    assert (row["id"], row["label"]) == (row_id, False)
    assert row["corrections"] == [{"verdict": True, "time": first}]
    ada.do(0, "verdict", value=False)  # a double click
    assert here.rows() == [row]
    ada.say("More.")
    ada.until()
    asked, seeds = here.engine.asked[-1]
    assert seeds == [6]
    answer = {"role": "assistant", "content": "answer to Hello?"}
    assert asked == [*prompt, answer, {"role": "user", "content": "More."}]
    assert ada.do(0, "verdict", value=None)["recorded"] == 0  # an undo, also later
    assert here.rows() == []
    ada.do(0, "verdict", value=True)
    assert len(here.rows()[0]["corrections"]) == 2
    for wrong in (0, 1, "true", [True], {}):
        ada.do(1, "verdict", 409, value=wrong)
    ada.do(7, "verdict", 409, value=True)
    assert len(here.rows()) == 1


def test_choices(here: Setting) -> None:
    ada = Person(here.site("choices"))
    ada.say("Hello?")
    turn = ada.until()
    assert [answer["text"] for answer in turn["answers"]] == ["answer A to Hello?", "answer B to Hello?"]
    ada.say("And now?", 409)  # which answer does the conversation continue with?
    for wrong in (True, False, 2, -1, "0", 0.5):
        ada.do(0, "verdict", 409, value=wrong)
    ada.do(0, "verdict", value=0)
    ada.do(0, "verdict", value=1)
    (row,) = here.rows()
    assert (row["rejected_seed"], row["chosen_seed"]) == tuple(here.engine.asked[-1][1])
    assert (row["chosen"], row["rejected"]) == ("answer B to Hello?", "answer A to Hello?")
    assert (row["chosen_finished"], row["rejected_finished"], row["chosen_position"]) == (True, True, "B")
    assert [each["verdict"] for each in row["corrections"]] == ["A"]
    ada.say("And now?")
    ada.until()
    assert here.engine.asked[-1][0][-2]["content"] == "answer B to Hello?"
    ada.do(0, "verdict", value=0)  # changes the record, not the conversation
    assert ada.seen()[0]["continued"] == 1
    assert here.rows()[0]["chosen"] == "answer A to Hello?"
    here.engine.texts = ["same", "same"]
    ada.do(1, "again")
    assert ada.until()["same"]
    ada.do(1, "verdict", 409, value=0)
    ada.say("Still, I continue.")
    ada.until()
    assert len(here.rows()) == 1


def test_people_wait_in_turn_and_lose_nothing(here: Setting) -> None:
    site = here.site()
    ada, bob, eve = Person(site, "Ada"), Person(site, "Bob"), Person(site, "Ada")
    here.engine.gate.clear()
    ada.say("from Ada")
    ada.until("writing")
    bob.say("from Bob")
    eve.say("from Eve")
    assert (bob.seen()[0]["status"], bob.seen()[0]["ahead"], eve.seen()[0]["ahead"]) == ("waiting", 0, 1)
    assert ada.seen()[0]["answers"][0]["text"] == "answer"  # as far as it is written
    here.engine.gate.set()
    for person in (ada, bob, eve):
        person.until()
        person.do(0, "verdict", value=person is ada)
    assert here.engine.most == 1
    assert [asked[-1]["content"] for asked, _ in here.engine.asked] == ["from Ada", "from Bob", "from Eve"]
    rows = [(row["annotator"], row["completion"], row["label"]) for row in here.rows()]
    names = [("Ada", "Ada"), ("Bob", "Bob"), ("Ada", "Eve")]
    assert rows == [(name, f"answer to from {word}", word == "Ada") for name, word in names]
    for thief in (bob, eve):  # even one of the same name
        assert thief.browser.get(f"/chats/{ada.chat}").status_code == 404
        thief.call(f"/chats/{ada.chat}/0/verdict", 404, value=False)
    assert len(here.rows()) == 3


def test_the_stream_ends_with_the_answer(here: Setting) -> None:
    ada = Person(here.site())
    here.engine.pause = 0.15
    ada.say("one two three")
    text = ada.browser.get(f"/chats/{ada.chat}/events").text  # returns when the stream ends
    events = [json.loads(line[6:])[0] for line in text.splitlines() if line.startswith("data: [")]
    texts = [event["answers"][0]["text"] for event in events if event["answers"]]
    assert texts[-1] == "answer to one two three"
    assert len(texts) > 2
    assert all(texts[-1].startswith(part) for part in texts)
    assert text.splitlines()[-3:-1] == ["event: end", "data: "]


def test_a_failed_a_stopped_and_an_empty_answer(here: Setting) -> None:
    ada = Person(here.site())
    here.engine.fails = ValueError("no memory\nleft")
    ada.say("Hello?")
    assert ada.until("failed")["error"] == "no memory left"
    ada.do(0, "verdict", 409, value=True)
    ada.say("Hello??", 409)
    here.engine.texts = [" \n"]
    ada.do(0, "again")
    assert "empty" in ada.until("failed")["error"]
    here.engine.texts = ["see <image>"]  # no loss can use such a row
    ada.do(0, "again")
    assert "<image>" in ada.until("failed")["error"]
    here.engine.gate.clear()
    ada.do(0, "again")
    ada.until("writing")
    ada.do(0, "stop")
    assert ada.seen()[0]["answers"] == []
    ada.do(0, "again")  # waits until the stopped one has ended
    here.engine.gate.set()
    assert ada.until()["answers"][0]["text"] == "answer to Hello?"
    ada.do(0, "verdict", value=True)
    ada.do(0, "again", 409)  # a judged answer stays
    assert len(here.rows()) == 1


@pytest.mark.parametrize("text", ["", " \u200b\n", "x" * 50_001, "look: <image>"])
def test_messages_that_cannot_be_answered(here: Setting, text: str) -> None:
    ada = Person(here.site())
    assert "error" in ada.say(text, 409)
    assert ada.seen() == []
    here.engine.refused = "too long for the model"
    assert ada.say("Hello?", 409) == {"error": "too long for the model"}


def test_a_verdict_that_cannot_be_written_is_not_shown(here: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    site = here.site()
    ada = Person(site)
    ada.say("Hello?")
    ada.until()

    def full(row: Any) -> None:
        raise OSError(28, "No space left on device", "a.jsonl")

    monkeypatch.setattr(site.conversations.file, "add", full)
    assert "No space left" in ada.do(0, "verdict", 507, value=True)["error"]
    assert ada.seen()[0]["value"] is None


def test_names_and_the_password(
    here: Setting, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halos_pl.collect.access.PAUSE", 0.05)
    site = here.site(password="correct horse")
    nobody = TestClient(make_app(site), follow_redirects=False)
    assert nobody.get("/").headers["location"] == "./enter"
    assert nobody.post("/chats", json={}).status_code == 401
    assert 'type="password"' in nobody.get("/enter").text
    start = time.monotonic()
    wrong = Person(site, "Ada", "correct horsf")
    assert time.monotonic() - start >= 0.05
    assert wrong.entered.status_code == 403
    assert 'value="Ada"' in wrong.entered.text
    assert wrong.browser.post("/chats", json={}).status_code == 401
    for name in ("", "  \t", "x" * 81):
        assert Person(site, name, "correct horse").entered.status_code == 403
    ada = Person(site, "Ada", "correct horse")
    assert ada.entered.status_code == 303
    cookie = ada.entered.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    page = ada.browser.get("/").text
    assert "Ada" in page
    ada.say("Hello?")
    ada.until()
    ada.do(0, "verdict", value=True)
    ada.browser.post("/leave")
    assert ada.browser.post("/chats", json={}).status_code == 401
    written = "".join(capfd.readouterr())
    assert "correct horse" not in written + page + wrong.entered.text + here.path.read_text()


def test_other_web_sites_cannot_use_the_page(here: Setting) -> None:
    site = here.site()
    ada = Person(site)
    forged = ada.browser.post("/chats", content="{}", headers={"content-type": "text/plain"})
    assert forged.status_code == 415
    for host in ("evil.example", "localhost.evil.example", "[", ""):
        assert ada.browser.get("/", headers={"host": host}).status_code == 400
    for host in ("localhost:7860", "127.0.0.1", "LOCALHOST"):
        assert ada.browser.get("/", headers={"host": host}).status_code == 200
    for path in ("/", "/enter", "/static/chat.js", "/nowhere"):
        headers = ada.browser.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    for content in (b"[]", b"{", b"x" * (1 << 20) + b"x"):
        response = ada.browser.post("/chats", content=content, headers={"content-type": "application/json"})
        assert response.status_code in (400, 413)
    assert ada.browser.get("/static/../app.py").status_code == 404
    assert ada.browser.get("/static/layout.html.jinja").status_code == 404


def test_nothing_is_loaded_from_elsewhere() -> None:
    for file in files("halos_pl.collect").joinpath("page").iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.[a-z]|@import|url\(", text), file.name


def rows(number: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i};", "label": i % 2 == 0} for i in range(number)]


def gallery(here: Setting, **options: Any) -> TestClient:
    return TestClient(make_app(make_site(here.path, **options)), follow_redirects=False)


def test_the_gallery_shows_the_newest_rows_first(here: Setting) -> None:
    browser = gallery(here)
    assert "Nothing has been collected" in browser.get("/").text
    write_jsonl(here.path, rows(45))
    shown = [re.findall(r"answer (\d+);", browser.get(f"/?page={page}").text) for page in (1, 2, 3, 4, "x")]
    assert shown[0] == [str(i) for i in range(44, 24, -1)]
    assert shown[1] + shown[2] == [str(i) for i in range(24, -1, -1)]
    assert (shown[3], shown[4]) == (shown[2], shown[0])
    with here.path.open("a") as file:  # a process collects meanwhile
        file.write('{"prompt": [{"role": "user", "content": "<b>x</b>"}], "chosen": "<script>", "rejected": "no",')
        file.write(' "annotator": "<i>", "time": "2026-01-02T03:04:05.678Z", "seed": 77}\n{"broken\n')
    page = browser.get("/").text
    assert "line 47 cannot be shown" in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "2026-01-02 03:04:05" in page
    assert "<dd>77</dd>" in page
    assert not re.search("<script>|<b>|<i>", page)
    assert browser.post("/chats", json={}).status_code == 404  # only looking


@pytest.mark.parametrize(
    "line", ["[" * 200_000, '{"prompt": ' + "[" * 200_000, "9" * 5000, "\udcff", '{"a": "\\ud800"}']
)
def test_a_line_that_cannot_be_shown_leaves_the_others(here: Setting, line: str) -> None:
    write_jsonl(here.path, [*rows(2), {"prompt": "half \ud800", "completion": "answer 7;", "label": True}])
    with here.path.open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    page = gallery(here).get("/")
    assert page.status_code == 200
    assert "line 4 cannot be shown" in page.text
    assert re.findall(r"answer (\d+);", page.text) == ["7", "1", "0"]


def test_the_gallery_with_a_password(here: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halos_pl.collect.access.PAUSE", 0.0)
    write_jsonl(here.path, rows(1))
    browser = gallery(here, password="correct horse")
    assert browser.get("/").headers["location"] == "./enter"
    assert browser.post("/enter", data={"password": "x"}).status_code == 403
    assert browser.post("/enter", data={"password": "correct horse"}).status_code == 303
    assert "answer 0;" in browser.get("/").text
