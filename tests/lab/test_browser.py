"""The page, in a real browser."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from mlx_optiq_ext.lab._supervisor import free_port

from .conftest import TIMEOUT, LabProcess

expect.set_options(timeout=TIMEOUT * 1000)

QUESTION = "Write a function that reads a file and returns its lines"


@pytest.fixture(scope="module")
def context(browser: Browser, lab: LabProcess) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(TIMEOUT * 1000)
    context.new_page().goto(lab.url)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, lab: LabProcess) -> Iterator[Page]:
    """A new tab; it may complain of nothing and ask nobody else."""
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: m.type == "error" and problems.append(m.text))
    page.on(
        "request",
        lambda r: (
            r.url.startswith((lab.base, "data:", "blob:")) or problems.append(r.url)
        ),
    )
    page.goto(lab.base)
    yield page
    page.close()
    # A refusal is a status that browsers put in the console.
    assert [each for each in problems if "409" not in each] == []


def visit(page: Page, name: str) -> None:
    page.get_by_role("link", name=name, exact=True).click()


def choose(page: Page, model: str) -> None:
    visit(page, "Server")
    page.locator(f"[data-name='{model}']").click()
    page.locator("#port").fill(str(free_port()))
    page.locator("#port").blur()


def is_ready(page: Page) -> None:
    expect(page.locator("#pill")).to_have_attribute("data-status", "ready")


def ready(
    page: Page, lab: LabProcess, model: str = "demo/qwen", **settings: Any
) -> None:
    """Have a model served with its head, greedily, unless it is."""
    wanted = {"model": model, "mtp": True, "sampling": {"temperature": 0}, **settings}
    state = lab.wait_for("state")
    settings = state["settings"] or {}
    if state["status"] != "ready" or settings | wanted != settings:
        lab.start(**wanted)
    is_ready(page)


def ask(page: Page, text: str = QUESTION) -> None:
    visit(page, "Chat")
    page.locator("#new-chat").click()
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def is_answered(page: Page) -> None:
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.locator(".message.assistant .stats").last).to_contain_text("tok/s")


def test_a_model_is_started_and_answers_with_tinted_drafts(page):
    choose(page, "demo/qwen")
    expect(page.locator("#verdict")).to_contain_text("MTP head found, it fits")
    page.locator("#number").select_option("2")
    page.locator("#sampling-temperature").fill("0")
    page.locator("#sampling-temperature").blur()
    command = page.locator("#command")
    expect(command).to_contain_text("--mtp --num-draft-tokens 2 --temp 0")
    page.locator("#start").click()
    expect(page.locator("#now")).to_have_attribute("data-status", "starting")
    expect(page.locator("#now progress")).to_be_visible()
    expect(page.locator("#now")).to_have_attribute("data-status", "ready")
    expect(page.locator("#now")).to_contain_text("MTP head")
    ask(page)
    is_answered(page)
    reply = page.locator(".message.assistant")
    assert reply.locator(".t.mtp").count() > 3
    assert reply.locator(".t:not(.mtp)").count() == 0
    expect(page.locator("mark.mtp")).to_have_text("MTP head")
    expect(reply.locator(".stats")).to_contain_text("tokens a round")
    expect(reply.locator(".stats")).to_contain_text("by position")
    tinted = "getComputedStyle(document.querySelector('.t.mtp')).backgroundColor"
    color = page.evaluate(tinted)
    page.locator("#tint").uncheck()
    assert page.evaluate(tinted) != color
    page.locator("#tint").check()


def test_what_is_tinted_is_what_was_drafted(page, lab):
    ready(page, lab, num_draft_tokens=2)
    ask(page)
    is_answered(page)
    message = {"role": "user", "content": QUESTION}
    answer = lab.post("chat", {"messages": [message], "max_tokens": 2048})
    lines = [x[6:] for x in answer.text.splitlines() if x.startswith("data: {")]
    chunks = map(json.loads, lines)
    tokens = [token for chunk in chunks for token in chunk.get("token_sources", [])]
    drafted = "".join(t["text"] for t in tokens if t["source"] == "mtp")
    assert drafted
    spans = page.locator(".message.assistant .t.mtp").all_inner_texts()
    assert "".join("".join(spans).split()) == "".join(drafted.split())


def test_the_race_shows_both_speeds_and_that_the_texts_are_identical(page, lab):
    ready(page, lab)
    visit(page, "Chat")
    page.locator("#new-chat").click()
    page.locator("#settings").click()
    page.locator("#chat-max_tokens").fill("24")
    page.locator("#chat-max_tokens").blur()
    page.locator("#prompt").fill(QUESTION)
    page.locator("#race").click()
    expect(page.locator("#verdict-race")).to_contain_text("identical")
    for lane in ("plain", "speculative"):
        speed = page.locator(f"[data-lane={lane}] .speed")
        expect(speed).to_have_text(re.compile(r"[\d.]+ tok/s, request to last token"))
    expect(page.locator("[data-lane=speculative] .stats")).to_contain_text("a round")
    expect(page.locator("[data-lane=plain] .t")).to_have_count(0)


def test_the_drafters_exclude_each_other_by_switching(page):
    choose(page, "demo/gemma")
    mtp, drafter = page.locator("#mtp"), page.locator("#drafter")
    drafter.select_option("demo/gemma-assistant")
    expect(mtp).not_to_be_checked()
    expect(page.locator("#verdict")).to_contain_text("assistant found, it fits")
    mtp.check()
    expect(drafter).to_have_value("")
    expect(page.locator("#command")).to_contain_text("--mtp")
    drafter.select_option("demo/gemma-assistant")
    expect(mtp).not_to_be_checked()
    expect(page.locator("#command")).to_contain_text("--draft")
    expect(page.locator("#command")).not_to_contain_text("--mtp")
    for control in (mtp, drafter):
        expect(control).to_be_enabled()


def test_sampling_is_not_taken_from_one_model_to_the_next(page):
    choose(page, "demo/qwen")
    temperature = page.locator("#sampling-temperature")
    expect(temperature).to_have_attribute("placeholder", "0.6 recommended")
    temperature.fill("0.3")
    temperature.blur()
    expect(page.locator("#command")).to_contain_text("--temp 0.3")
    choose(page, "demo/gemma")
    expect(temperature).to_have_value("")
    expect(temperature).to_have_attribute("placeholder", "1 recommended")
    expect(page.locator("#command")).not_to_contain_text("--temp")


def test_a_model_without_a_head_says_why_and_is_not_started_with_one(page, headless):
    choose(page, str(headless))
    row = page.locator(f"[data-name='{headless}']")
    expect(row).to_contain_text("no head")
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("Speculation is off")
    expect(verdict).to_contain_text("extract-mtp")
    page.locator("#mtp").check()
    expect(verdict).to_contain_text("Will not be started")
    page.locator("#start").click()
    expect(page.locator("#refusal")).to_contain_text("there is no MTP head")
    expect(page.locator("#now")).not_to_contain_text(headless.name)


def test_a_port_in_use_is_told_and_another_one_offered(page, lab):
    choose(page, "demo/qwen")
    expect(page.locator("#mtp")).to_be_checked()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        page.locator("#port").fill(str(port))
        page.locator("#port").blur()
        page.locator("#start").click()
        expect(page.locator("#refusal")).to_contain_text(f"port {port} is in use")
        page.get_by_role("button", name="Take a free port").click()
        expect(page.locator("#port")).not_to_have_value(str(port))
        page.locator("#start").click()
        is_ready(page)


def test_a_server_that_is_killed_is_seen_to_come_back(page, lab):
    ready(page, lab)
    visit(page, "Server")
    pid = lab.wait_for("state")["pid"]
    os.kill(pid, signal.SIGKILL)
    expect(page.locator("#now")).to_contain_text("killed by SIGKILL")
    expect(page.locator("#now")).to_have_attribute("data-status", "ready")
    assert lab.wait_for("state")["pid"] != pid


def test_a_reply_survives_a_reload_as_far_as_it_had_come(page, lab, endless):
    ready(page, lab, str(endless))
    ask(page)
    text = page.locator(".message.assistant .md")
    expect(text).to_contain_text(re.compile(r"(\w+\W+){20}"))
    page.reload()
    expect(page.locator(".message.assistant")).to_contain_text("was cut off")
    expect(text).to_contain_text(re.compile(r"(\w+\W+){20}"))
    assert lab.wait_for("sample", lambda s: s["running"] == 0)
    page.get_by_role("button", name="Regenerate").click()
    expect(text).to_contain_text(re.compile(r"(\w+\W+){20}"))
    page.locator("#prompt").press("Escape")
    expect(page.locator(".message.assistant")).to_contain_text("Stopped.")
    expect(page.locator("#send")).to_have_text("Send")


def test_two_tabs_show_the_same(page, lab, context):
    ready(page, lab)
    other = context.new_page()
    other.goto(f"{lab.base}/#chat")
    ask(page, "Write a class that both tabs show")
    is_answered(page)
    item = other.locator(".list .item", has_text="Write a class that both tabs show")
    item.click()
    expect(other.locator(".message.assistant .stats")).to_contain_text("tok/s")
    visit(page, "Server")
    page.locator("#stop").click()
    expect(other.locator("#pill")).to_have_attribute("data-status", "stopped")
    expect(other.locator("#send")).to_be_disabled()
    other.close()


def test_a_message_is_edited_and_sent_again(page, lab):
    ready(page, lab)
    ask(page)
    is_answered(page)
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("Write a class")
    page.get_by_role("button", name="Send again").click()
    expect(page.locator(".message.user .body")).to_have_text("Write a class")
    is_answered(page)
    expect(page.locator(".message")).to_have_count(2)


MARKDOWN = """# Title
<img src=x onerror="window.hurt = 1"><script>window.hurt = 1</script>

Some **bold**, `code <b>` and [a link](javascript:window.hurt=1), https://example.org.

- one
- two
  - deeper

| a | b |
|---|---|
| 1 | 2 |

```html
<iframe src="https://example.org"></iframe>
```
"""
CALL = {"id": "1", "function": {"name": "<b>call</b>", "arguments": '{"a": "<i>"}'}}


def show(page: Page, *messages: dict[str, Any]) -> None:
    """Open a conversation that was kept in the browser."""
    kept = {
        "id": "kept",
        "title": "<i>Kept</i>",
        "at": 1,
        "system": "",
        "thinking": "",
        "tools": "",
        "sampling": {},
        "messages": messages,
    }
    page.evaluate(
        "text => localStorage.setItem('lab.chat.kept', text)", json.dumps(kept)
    )
    page.reload()
    visit(page, "Chat")
    page.locator(".list .item", has_text="<i>Kept</i>").click()


def test_text_of_a_model_is_never_html(page):
    message = {
        "role": "assistant",
        "content": MARKDOWN,
        "reasoning": "<b>thought</b>",
        "tool_calls": [CALL],
        "state": "done",
    }
    show(page, {"role": "user", "content": "<i>Hi</i>"}, message)
    reply = page.locator(".message.assistant")
    for tag in ("img", "script", "iframe", "i", "b:not(.row b)"):
        expect(page.locator(f".messages {tag}")).to_have_count(0)
    assert page.evaluate("window.hurt") is None
    expect(reply.locator("h1")).to_have_text("Title")
    expect(reply.locator("strong")).to_have_text("bold")
    expect(reply.locator("p code")).to_have_text("code <b>")
    expect(reply.locator("li li")).to_have_text("deeper")
    expect(reply.locator("td")).to_have_count(2)
    expect(reply.locator(".code code")).to_contain_text("<iframe")
    expect(reply.locator("a")).to_have_attribute("href", "https://example.org")
    expect(reply.locator(".think")).to_contain_text("<b>thought</b>")
    expect(reply.locator(".call")).to_contain_text("Call of <b>call</b>")


def test_tints_are_in_the_right_place_in_markdown(page):
    content = "A **bold word** and\n- an item\n\n```\ncode\n```\n"
    tinted = ("old wo", "n it", "de")
    runs: list[Any] = []
    place = 0
    for piece in tinted:
        start = content.index(piece, place)
        runs += [[None, start - place], ["copy", len(piece)]]
        place = start + len(piece)
    message = {
        "role": "assistant",
        "content": content,
        "sources": runs,
        "state": "done",
    }
    show(page, {"role": "user", "content": "Hi"}, message)
    assert page.locator(".t.copy").all_inner_texts() == list(tinted)


def test_the_log_and_the_requests_are_shown_live(page, lab):
    ready(page, lab)
    ask(page)
    is_answered(page)
    visit(page, "Live")
    expect(page.locator("#live td").nth(1)).to_have_text("/v1/chat/completions")
    expect(page.locator("#live svg.chart")).to_have_count(6)
    expect(page.locator("#log")).to_contain_text("Starting httpd")
    page.get_by_label("Filter the log").fill("no such line")
    expect(page.locator("#log")).to_have_text("Nothing to show.")


def test_a_benchmark_is_plotted_kept_and_exported(page, lab, tmp_path):
    ready(page, lab)
    visit(page, "Bench")
    page.locator("#bench-depth").select_option("1")
    page.locator("#bench-tokens").fill("4")
    page.locator("#bench-run").click()
    expect(page.locator("#bench progress")).to_be_visible()
    expect(page.locator("#bench svg.chart")).to_have_count(3)
    page.reload()
    visit(page, "Bench")
    expect(page.locator("#bench tbody tr")).to_have_count(2)
    with page.expect_download() as saved:
        page.locator("#bench-markdown").click()
    saved.value.save_as(tmp_path / "bench.md")
    text = (tmp_path / "bench.md").read_text()
    assert "| Draft tokens | Speed-up |" in text
    with page.expect_download() as saved:
        page.locator("#bench-png").click()
    saved.value.save_as(tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["Server", "Chat", "Live", "Bench"])
def test_a_page_fits_a_phone(page, name):
    page.set_viewport_size({"width": 375, "height": 700})
    visit(page, name)
    section = page.locator(f"#{name.lower()}")
    expect(section).to_be_visible()
    width = "e => Math.max(e.scrollWidth, document.documentElement.scrollWidth)"
    assert page.locator("main").evaluate(width) <= 375


def test_the_keyboard_reaches_and_changes_everything(page):
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the page")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#chat")).to_be_visible()
    visit(page, "Server")
    page.locator("#mtp").focus()
    is_on = page.locator("#mtp").is_checked()
    page.keyboard.press("Space")
    expect(page.locator("#mtp")).to_be_checked(checked=not is_on)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_follows_the_colours_of_the_system(browser, lab, scheme):
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(lab.url)
    background = "getComputedStyle(document.body).backgroundColor"
    colors = [int(x) for x in re.findall(r"\d+", page.evaluate(background))[:3]]
    assert (sum(colors) > 380) == (scheme == "light")
    page.locator("#theme").click()
    colors = [int(x) for x in re.findall(r"\d+", page.evaluate(background))[:3]]
    assert (sum(colors) > 380) == (scheme == "dark")
    context.close()


def test_a_lab_that_has_ended_is_told(browser, start_lab):
    own = start_lab()
    page = browser.new_page()
    page.goto(own.url)
    expect(page.locator("#lost")).to_be_hidden()
    own.close()
    expect(page.locator("#lost")).to_contain_text("does not answer")
    page.close()


def test_the_address_without_the_token_shows_nothing(browser: Browser, lab: LabProcess):
    context = browser.new_context()
    page = context.new_page()
    page.goto(lab.base)
    expect(page.locator("body")).to_contain_text("holds the token")
    context.close()


def test_a_page_elsewhere_reads_and_does_nothing(
    browser: Browser, lab: LabProcess, tmp_path: Path, context: BrowserContext
):
    """Even in the browser that has the cookie, and from this machine."""
    stranger = context.new_page()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        origin = f"http://127.0.0.1:{unused.getsockname()[1]}"
    page_elsewhere = lambda route: route.fulfill(body="<p>elsewhere</p>")  # noqa: E731
    stranger.route(f"{origin}/**", page_elsewhere)
    stranger.goto(origin)
    attempt = """async ([url, mode, method]) => {
        const body = method === 'POST' ? '{}' : undefined;
        try {
            const options = { mode, method, body, credentials: 'include' };
            const answer = await fetch(url, options);
            return answer.type === 'opaque' ? 'opaque' : await answer.text();
        } catch (error) { return 'refused'; }
    }"""
    for mode, method, path in (
        ("cors", "GET", "/api/events"),
        ("cors", "POST", "/api/stop"),
        ("no-cors", "POST", "/api/stop"),
        ("no-cors", "GET", "/app.js"),
    ):
        found = stranger.evaluate(attempt, [lab.base + path, mode, method])
        assert found in ("refused", "opaque")
    stranger.close()
