"""The page of ``halos collect`` in Chromium, at the width of a desktop and of a phone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from collect_page import FakeEngine, make_site, serving
from run_halos import write_jsonl

pytestmark = pytest.mark.slow
pytest.importorskip("starlette", reason="starlette is not installed (extra: collect)")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
SIZES = pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
LONG = "A long answer with a-very-long-word-" + "x" * 80 + " and several sentences. " * 6
#: Adds up the layout shifts that no input of the person caused.
SHIFTS = """
window.shifts = 0;
new PerformanceObserver((list) => list.getEntries().forEach((entry) => { window.shifts += entry.value; }))
  .observe({ type: "layout-shift", buffered: true });
"""

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Open]:
    """Opens a browser of its own on an address. Faults of the script, and requests to other hosts, fail the test."""
    contexts, faults = [], list[str]()

    def open_page(url: str, size: dict[str, Any], name: str | None = "Ada", **options: Any) -> Any:
        context = chromium.new_context(**size, **options)
        context.set_default_timeout(30_000)
        context.add_init_script(SHIFTS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: request.url.startswith(url) or faults.append(request.url))
        page.goto(url)
        if name is not None:
            page.get_by_label("Your name").fill(name)
            page.get_by_role("button", name="Start").click()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def expect(locator: Any) -> Any:
    return playwright.expect(locator)


def fits(page: Any) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


@SIZES
def test_thumbs(opened: Open, tmp_path: Path, size: dict[str, Any]) -> None:
    path, engine = tmp_path / "a.jsonl", FakeEngine()
    with serving(make_site(path, engine=engine)) as url:
        page = opened(url, size)
        engine.texts = [LONG]
        say(page, "Hello?")
        good, bad = page.get_by_role("button", name="Good"), page.get_by_role("button", name="Bad")
        expect(page.locator(".answer .text")).to_have_text(LONG.strip())
        expect(good).to_be_enabled()
        expect(page.get_by_label("Message", exact=True)).to_have_value("")
        assert rows(path) == []
        places = [page.locator(part).bounding_box() for part in (".answer", ".verdicts", "#composer", "header")]
        page.evaluate("window.shifts = 0")
        good.click()
        expect(page.get_by_text("Recorded at")).to_be_visible()
        expect(good).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#count")).to_have_text("1")
        bad.click()
        expect(bad).to_have_attribute("aria-pressed", "true")
        expect(good).to_have_attribute("aria-pressed", "false")
        assert [row["label"] for row in rows(path)] == [False]
        page.reload()
        expect(bad).to_have_attribute("aria-pressed", "true")  # a reload loses nothing
        page.get_by_role("button", name="Undo").click()
        expect(page.get_by_text("Not judged")).to_be_visible()
        assert rows(path) == []
        after = [page.locator(part).bounding_box() for part in (".answer", ".verdicts", "#composer", "header")]
        assert [place["height"] for place in after] == [place["height"] for place in places]
        assert after[2:] == places[2:]
        assert page.evaluate("window.shifts") < 0.01
        assert fits(page)
        for button in page.get_by_role("button").all():
            box = button.bounding_box()
            assert box is None or box["height"] >= 24  # WCAG 2.2, target size
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator(".turn")).to_have_count(0)


@SIZES
def test_choices(opened: Open, tmp_path: Path, size: dict[str, Any]) -> None:
    path, engine = tmp_path / "a.jsonl", FakeEngine()
    with serving(make_site(path, "choices", engine)) as url:
        page = opened(url, size)
        engine.texts = [LONG, "A short answer."]
        say(page, "Hello?")
        first, second = page.get_by_role("button", name="A is better"), page.get_by_role("button", name="B is better")
        expect(first).to_be_enabled()
        expect(page.get_by_role("button", name="Send")).to_be_disabled()  # not before a choice
        left, right = (answer.bounding_box() for answer in page.locator(".answer").all())
        side_by_side = right["x"] > left["x"] and right["y"] == left["y"]
        assert side_by_side == (size is DESKTOP)
        assert fits(page)
        first.click()
        expect(first).to_have_attribute("aria-pressed", "true")
        second.click()
        expect(second).to_have_attribute("aria-pressed", "true")
        (row,) = rows(path)
        assert (row["chosen"], row["rejected"], row["chosen_position"]) == ("A short answer.", LONG, "B")
        say(page, "And now?")
        expect(page.locator(".turn")).to_have_count(2)
        expect(first.nth(1)).to_be_enabled()
        assert engine.asked[-1][0][1]["content"] == "A short answer."
        first.nth(1).click()
        expect(page.get_by_text("Recorded at")).to_have_count(2)
        assert len(rows(path)) == 2


def test_only_the_keyboard(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with serving(make_site(path, engine=FakeEngine())) as url:
        page = opened(url, DESKTOP, None)
        page.keyboard.type("Ada")  # the field has the focus
        page.keyboard.press("Enter")
        expect(page.get_by_label("Message", exact=True)).to_be_focused()
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Good")).to_be_enabled()
        for _ in range(3):  # past the button for a new answer and past Bad
            page.keyboard.press("Shift+Tab")
        expect(page.get_by_role("button", name="Good")).to_be_focused()
        page.keyboard.press("Space")
        expect(page.get_by_text("Recorded at")).to_be_visible()
        (row,) = rows(path)
        assert (row["annotator"], row["prompt"][-1]["content"], row["label"]) == ("Ada", "one\ntwo", True)


def test_two_people_and_a_reload_while_the_model_writes(opened: Open, tmp_path: Path) -> None:
    path, engine = tmp_path / "a.jsonl", FakeEngine()
    with serving(make_site(path, engine=engine)) as url:
        ada, bob = opened(url, DESKTOP, "Ada"), opened(url, PHONE, "Bob")
        engine.gate.clear()
        say(ada, "from Ada")
        expect(ada.get_by_text("The model is writing")).to_be_visible()
        expect(ada.locator(".answer .text")).to_have_text("answer")
        say(bob, "from Bob")
        expect(bob.get_by_text("Waiting for the model")).to_be_visible()
        ada.reload()
        expect(ada.locator(".answer .text")).to_have_text("answer")
        engine.gate.set()
        for person, name in ((ada, "Ada"), (bob, "Bob")):
            expect(person.locator(".answer .text")).to_have_text(f"answer to from {name}")
            expect(person.locator(".turn")).to_have_count(1)
        bob.get_by_role("button", name="Bad").click()
        ada.get_by_role("button", name="Good").click()
        for person in (ada, bob):
            expect(person.get_by_text("Recorded at")).to_be_visible()
        assert sorted((row["annotator"], row["label"]) for row in rows(path)) == [("Ada", True), ("Bob", False)]


def test_when_the_model_or_the_server_fails(opened: Open, tmp_path: Path) -> None:
    path, engine = tmp_path / "a.jsonl", FakeEngine()
    with serving(make_site(path, engine=engine)) as url:
        page = opened(url, PHONE)
        engine.fails = ValueError("the graphics card has no memory left")
        say(page, "Hello?")
        expect(page.get_by_text("No answer: the graphics card has no memory left.")).to_be_visible()
        expect(page.get_by_role("button", name="Good")).to_be_disabled()
        page.get_by_role("button", name="Try again").click()
        expect(page.get_by_role("button", name="Good")).to_be_enabled()
        engine.gate.clear()
        say(page, "More?")
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_text("Stopped.")).to_be_visible()
        engine.gate.set()
        page.get_by_role("button", name="Try again").click()
        expect(page.get_by_role("button", name="Good").nth(1)).to_be_enabled()
        engine.refused = "too long for the model"
        say(page, "A draft")
        expect(page.get_by_text("Too long for the model.")).to_be_visible()
        expect(page.get_by_label("Message", exact=True)).to_have_value("A draft")  # is not lost
    page.get_by_role("button", name="Good").first.click()
    expect(page.get_by_text("nothing was recorded")).to_be_visible()
    expect(page.get_by_role("button", name="Good").first).to_have_attribute("aria-pressed", "false")
    assert rows(path) == []


@SIZES
def test_the_gallery(opened: Open, tmp_path: Path, size: dict[str, Any]) -> None:
    facts = {"annotator": "Ada", "time": "2026-01-02T03:04:05.678Z", "seed": 77}
    prompt = [{"role": m, "content": m} for m in ("user", "assistant")] + [{"role": "user", "content": "the question"}]
    pairs = [{"prompt": prompt, "chosen": f"<b>{i}</b> {LONG}", "rejected": "no", **facts} for i in range(25)]
    path = Path(write_jsonl(tmp_path / "a.jsonl", pairs))
    with serving(make_site(path)) as url:
        page = opened(url, size, None)
        expect(page.get_by_text("25 rows")).to_be_visible()
        expect(page.locator("article")).to_have_count(20)
        expect(page.get_by_text("<b>24</b>")).to_be_visible()
        assert fits(page)
        page.get_by_text("Ada").first.click()
        expect(page.get_by_text("77").first).to_be_visible()
        page.get_by_role("link", name="Older").first.click()
        expect(page.locator("article")).to_have_count(5)
        expect(page.get_by_text("<b>0</b>")).to_be_visible()
        assert page.get_by_role("button").count() == 0


def test_the_password(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halos_pl.collect.access.PAUSE", 0.1)
    with serving(make_site(tmp_path / "a.jsonl", engine=FakeEngine(), password="correct horse")) as url:
        page = opened(url, PHONE, None)
        for password in ("wrong horse", "correct horse"):
            page.get_by_label("Your name").fill("Ada")
            page.get_by_label("Password").fill(password)
            page.get_by_role("button", name="Start").click()
            if password == "wrong horse":
                expect(page.get_by_role("alert")).to_have_text("This password is wrong.")
        expect(page.get_by_label("Message", exact=True)).to_be_visible()
        assert fits(page)
        page.get_by_role("button", name="Change name").click()
        expect(page.get_by_label("Password")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible(opened: Open, tmp_path: Path, scheme: str) -> None:
    """Contrast of at least 4.5 (WCAG AA) between each text and the ground behind it."""
    with serving(make_site(tmp_path / "a.jsonl", engine=FakeEngine())) as url:
        page = opened(url, DESKTOP, color_scheme=scheme)
        say(page, "Hello?")
        page.get_by_role("button", name="Good").click()
        expect(page.get_by_text("Recorded at")).to_be_visible()
        page.mouse.move(0, 0)
        seen = page.evaluate(
            """() => [...document.querySelectorAll("h1, p, code, summary, button:enabled, #count")]
              .filter((e) => e.offsetParent && e.textContent.trim())
              .map((e) => {
                let ground = e;
                while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
                return [e.textContent.trim(), getComputedStyle(e).color, getComputedStyle(ground).backgroundColor];
              })"""
        )
        assert len(seen) > 10
        low = [(text, contrast(ink, ground)) for text, ink, ground in seen if contrast(ink, ground) < 4.5]
        assert low == []


def contrast(one: str, other: str) -> float:
    """Contrast of two colours by WCAG's formula."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)
