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


def enter(page: Page, lab: LabProcess) -> None:
    """Open the address that the Lab printed."""
    page.goto(lab.url)
    page.wait_for_url(f"{lab.base}/")
    expect(page.locator("#pill")).not_to_be_empty()


@pytest.fixture(scope="module")
def context(browser: Browser, lab: LabProcess) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(TIMEOUT * 1000)
    enter(context.new_page(), lab)
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


def show(page: Page, *messages: dict[str, Any], **fields: Any) -> None:
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
        **fields,
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
        runs += [[None, start - place], ["prompt_lookup", len(piece)]]
        place = start + len(piece)
    message = {
        "role": "assistant",
        "content": content,
        "sources": runs,
        "state": "done",
    }
    show(page, {"role": "user", "content": "Hi"}, message)
    assert page.locator(".t.prompt_lookup").all_inner_texts() == list(tinted)


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
    enter(page, lab)
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
    enter(page, own)
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


def test_a_link_to_the_lab_on_another_page_is_followed(browser: Browser, lab):
    """Browsers send no strict cookie along a redirection that began elsewhere."""
    context = browser.new_context()
    page = context.new_page()
    page.route(
        "http://elsewhere.example/",
        lambda route: route.fulfill(
            content_type="text/html", body=f"<a href='{lab.url}'>the Lab</a>"
        ),
    )
    page.goto("http://elsewhere.example/")
    page.get_by_text("the Lab").click()
    expect(page.locator("#pill")).to_be_visible()
    assert "token" not in page.url
    page.go_back()
    assert "token" not in page.url
    context.close()


def test_the_skip_link_stays_on_its_page(page):
    visit(page, "Live")
    page.get_by_role("link", name="Skip to the page").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#live")).to_be_visible()
    expect(page.locator("#page")).to_be_focused()


@pytest.mark.parametrize("name", ["constructor", "toString", "no-such-page"])
def test_an_unknown_page_is_the_first_one(page, lab, name):
    page.goto(f"{lab.base}/#{name}")
    expect(page.locator("#server")).to_be_visible()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"messages": [null, 3, {"role": "root"}], "sampling": null, "title": 3}',
        '{"messages": [{"role": "assistant", "sources": 3, "stats": {}, "race": {}}]}',
        '{"messages": [{"role": "assistant", "tool_calls": [{}, null]}], "at": "x"}',
        '{"messages": [{"role": "user"}], "system": null, "tools": 3}',
        '[{"id": "1", "at": 1, "model": "a", "drafter": "b", "result": {}}]',
    ],
)
def test_whatever_is_in_the_store_of_the_browser_the_page_works(page, text):
    keep = "([key, text]) => localStorage.setItem(key, text)"
    page.evaluate(keep, ["lab.chat.broken", text])
    page.evaluate(keep, ["lab.bench", text])
    page.reload()
    for name in ("Bench", "Chat"):
        visit(page, name)
        expect(page.locator(f"#{name.lower()}")).to_be_visible()
        expect(page.locator("#pill")).not_to_be_empty()
    for item in page.locator(".list .item").all():
        item.click()
    expect(page.locator("#prompt")).to_be_visible()
    page.evaluate("localStorage.removeItem('lab.chat.broken')")


def test_a_full_store_is_told_and_stops_nothing(page, lab):
    ready(page, lab)
    fill = """() => {
        for (const size of [1 << 16, 1]) try {
            for (let i = 0; ; i += 1)
                localStorage.setItem(`full.${size}.${i}`, 'x'.repeat(size));
        } catch { continue; }
    }"""
    page.evaluate(fill)
    try:
        page.locator("#theme").click()
        ask(page)
        is_answered(page)
        expect(page.locator("#toast")).to_contain_text("store is full")
        expect(page.locator(".message.assistant .md")).not_to_be_empty()
    finally:
        page.evaluate("localStorage.clear()")


def test_a_page_works_where_nothing_may_be_stored(browser: Browser, lab):
    context = browser.new_context()
    context.add_init_script(
        "Object.defineProperty(window, 'localStorage', "
        "{ get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    page = context.new_page()
    enter(page, lab)
    ready(page, lab)
    ask(page)
    is_answered(page)
    context.close()


@pytest.mark.parametrize(
    "text",
    [
        ">" * 20_000 + " deep",
        "- " * 20_000 + "deep",
        "**a " * 20_000 + "deep",
        "[" * 20_000 + "deep",
        "# " + " " * 20_000 + "deep",
        "`" * 20_000 + " deep",
        "|" * 20_000 + "\n" + "|-" * 20_000 + " deep",
        "x" * 100_000 + " deep",
        "```\nnever closed deep",
        "\U0001f469\u200d\U0001f52c \u202e deep \ufffd",
    ],
)
def test_no_text_of_a_model_stops_the_page(page, text):
    show(
        page,
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "reasoning": text, "state": "done"},
    )
    expect(page.locator(".message.assistant .md").last).to_contain_text("deep")
    width = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(width) <= 0
    page.evaluate("localStorage.removeItem('lab.chat.kept')")


def test_text_runs_in_the_direction_of_its_letters(page):
    show(page, {"role": "user", "content": "\u05e9\u05dc\u05d5\u05dd"})
    body = page.locator(".message.user .body")
    assert body.evaluate("e => getComputedStyle(e).unicodeBidi") == "plaintext"


def test_what_has_come_stays_as_it_is_while_more_comes(page):
    """Otherwise nothing of it could be selected, and a long reply would be slow."""
    kept = page.evaluate("""async () => {
            const { render } = await import("/markdown.js");
            const element = document.createElement("div");
            const paint = (text) => [document.createTextNode(text)];
            render(element, "# One\\n\\ntwo\\n\\n- th", paint);
            const before = [...element.children];
            render(element, "# One\\n\\ntwo\\n\\n- three\\n\\nfour", paint);
            return [...element.children].map((child, i) => child === before[i]);
        }""")
    assert kept == [True, True, False, False]


def test_a_message_can_be_edited_while_a_reply_comes(page, lab, endless):
    ready(page, lab, str(endless))
    ask(page)
    expect(page.locator(".message.assistant .md > *")).not_to_have_count(0)
    page.get_by_role("button", name="Edit").click()
    editor = page.get_by_label("Edit the message")
    editor.fill("Something else")
    page.get_by_role("button", name="Send again").click()
    expect(page.locator("#toast")).to_contain_text("stop it first")
    page.locator("#send").click()
    expect(page.locator("#send")).to_have_text("Send")
    expect(editor).to_have_value("Something else")
    page.get_by_role("button", name="Send again").click()
    expect(page.locator(".message.user .body")).to_have_text("Something else")
    expect(page.locator("#send")).to_have_text("Stop")
    page.locator("#send").click()
    expect(page.locator("#send")).to_have_text("Send")


def test_a_reply_that_comes_in_another_tab_is_not_said_to_be_cut_off(
    page, lab, context, endless
):
    ready(page, lab, str(endless))
    ask(page, "Write what two tabs show")
    text = page.locator(".message.assistant .md")
    expect(text).to_contain_text(re.compile(r"(\w+\W+){20}"))
    other = context.new_page()
    other.goto(f"{lab.base}/#chat")
    other.locator(".list .item", has_text="Write what two tabs show").click()
    reply = other.locator(".message.assistant")
    expect(reply).to_contain_text("It comes in another tab")
    expect(reply).not_to_contain_text("cut off")
    other.locator("#prompt").fill("And this")
    other.locator("#prompt").press("Enter")
    expect(other.locator("#toast")).to_contain_text("Another tab is answered")
    expect(other.locator("#prompt")).to_have_value("And this")
    page.locator("#prompt").press("Escape")
    expect(reply).to_contain_text("Stopped.")
    other.close()


def test_a_tab_that_is_closed_leaves_its_reply_cut_off(page, lab, context, endless):
    ready(page, lab, str(endless))
    other = context.new_page()
    other.goto(lab.base)
    ask(other, "Write what a closed tab shows")
    expect(other.locator(".message.assistant .md > *")).not_to_have_count(0)
    visit(page, "Chat")
    page.locator(".list .item", has_text="Write what a closed tab shows").click()
    expect(page.locator(".message.assistant")).to_contain_text("another tab")
    other.close()
    expect(page.locator(".message.assistant")).to_contain_text("was cut off")


def test_a_reply_is_spoken_as_it_comes(page, lab):
    ready(page, lab)
    ask(page)
    is_answered(page)
    spoken = page.locator("#spoken")
    expect(spoken).to_have_attribute("aria-live", "polite")
    said = "".join(spoken.inner_text().split())
    shown = "".join(page.locator(".message.assistant .md").inner_text().split())
    assert said
    assert said[:20] in shown or shown[:20] in said


def sent(page: Page, act: Any) -> dict[str, Any]:
    """What the page asks the server when something is done."""
    with page.expect_request("**/api/chat") as found:
        act()
    body: dict[str, Any] = found.value.post_data_json
    return body


def test_settings_of_a_conversation_are_those_of_its_requests(page, lab):
    ready(page, lab)
    visit(page, "Chat")
    page.locator("#new-chat").click()
    page.locator("#settings").click()
    for name, value in (
        ("system", "Be brief."),
        ("chat-temperature", "0.5"),
        ("chat-top_k", "3"),
        ("chat-seed", "7"),
        ("chat-max_tokens", "8"),
        (
            "tools",
            '[{"type": "function", "function": {"name": "f", "parameters": {}}}]',
        ),
    ):
        page.locator(f"#{name}").fill(value)
    page.locator("#thinking").select_option("off")
    page.locator("#thinking").blur()
    page.locator("#prompt").fill("Hi")
    body = sent(page, lambda: page.locator("#prompt").press("Enter"))
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert (body["temperature"], body["top_k"], body["seed"]) == (0.5, 3, 7)
    assert body["max_tokens"] == 8
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["tools"][0]["function"]["name"] == "f"
    expect(page.locator(".message.assistant")).to_contain_text("limit of tokens")
    again = page.get_by_role("button", name="Regenerate")
    assert sent(page, again.click)["messages"] == body["messages"]
    expect(page.locator(".message.assistant .stats")).to_contain_text("8 tokens")
    expect(page.locator(".message")).to_have_count(2)
    page.locator("#new-chat").click()
    expect(page.locator("#system")).to_have_value("")


def test_tools_that_are_not_json_are_told(page, lab):
    ready(page, lab)
    show(page, {"role": "user", "content": "Hi"}, tools="{broken")
    page.locator("#prompt").fill("Go on")
    page.locator("#prompt").press("Enter")
    expect(page.locator(".message .problem")).to_contain_text("are not JSON")


def test_a_call_is_shown_and_given_its_result(page, lab):
    ready(page, lab)
    function = {"name": "weather", "arguments": '{"city": "Pa'}
    calls = [{"id": "1", "type": "function", "function": function}]
    asking = {"role": "assistant", "content": "", "tool_calls": calls, "state": "done"}
    show(page, {"role": "user", "content": "Hi"}, asking)
    expect(page.locator(".call pre")).to_have_text(function["arguments"])
    page.get_by_label("Result of the call").fill("sunny")
    go_on = page.get_by_role("button", name="Send the result")
    body = sent(page, go_on.click)
    assert body["messages"][1]["tool_calls"] == calls
    assert body["messages"][2] == {
        "role": "tool",
        "content": "sunny",
        "tool_call_id": "1",
    }
    is_answered(page)
    expect(page.get_by_role("button", name="Send the result")).to_have_count(0)


def test_code_and_replies_are_copied(page, context):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    content = "Before\n\n```python\nprint(1)\n```\n"
    show(
        page,
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": content, "state": "done"},
    )
    read = "navigator.clipboard.readText()"
    page.locator(".code").get_by_role("button", name="Copy").click()
    expect(page.locator("#toast")).to_have_text("Copied")
    assert page.evaluate(read) == "print(1)"
    page.locator(".message.assistant .tools").get_by_role("button", name="Copy").click()
    assert page.evaluate(f"{read}.then(text => text)") == content


def test_a_run_that_is_deleted_stays_deleted(page, lab):
    ready(page, lab)
    visit(page, "Bench")
    page.evaluate("localStorage.removeItem('lab.bench')")
    page.reload()
    runs = page.locator("#bench").get_by_role("button", name="Delete")
    expect(runs).to_have_count(0)
    page.locator("#bench-depth").select_option("1")
    page.locator("#bench-tokens").fill("4")
    page.locator("#bench-run").click()
    expect(runs).to_have_count(1)
    runs.click()
    expect(runs).to_have_count(0)
    page.reload()
    visit(page, "Bench")
    expect(page.locator("#pill")).to_have_attribute("data-status", "ready")
    expect(runs).to_have_count(0)


def test_the_button_that_starts_keeps_the_focus(page, lab):
    choose(page, "demo/qwen")
    page.locator("#start").focus()
    page.keyboard.press("Enter")
    is_ready(page)
    expect(page.locator("#start")).to_be_focused()


def test_a_server_that_does_not_answer_is_told(page, lab):
    ready(page, lab)
    pid = lab.wait_for("state")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        expect(page.locator("#pill")).to_have_attribute("data-status", "silent")
        visit(page, "Server")
        expect(page.locator("#now")).to_contain_text("does not answer")
    finally:
        os.kill(pid, signal.SIGCONT)
    is_ready(page)


def test_each_model_says_what_doctor_knows_of_it(page):
    visit(page, "Server")
    row = page.locator("[data-name='demo/qwen']")
    expect(row).to_contain_text("MTP head")
    expect(row).to_contain_text("of memory")
    expect(row).to_contain_text("head in demo_model/model.safetensors")


def test_a_log_that_pours_is_drawn_once_a_frame(page, lab):
    ready(page, lab)
    visit(page, "Live")
    expect(page.locator("#log")).to_contain_text("Starting httpd")
    count = """() => new Promise((resolve) => {
        let changes = 0;
        new MutationObserver(() => { changes += 1; })
            .observe(document.getElementById("log"), { childList: true });
        import("/store.js").then(({ state }) => {
            const first = state.log.length;
            setTimeout(() => resolve([changes, state.log.length - first]), 2000);
        });
    })"""
    lines = page.evaluate_handle(f"window.counted = ({count})()")
    for _ in range(40):
        lab.client.get(f"{lab.wait_for('state')['url']}/nowhere")
    del lines
    changes, added = page.evaluate("window.counted")
    assert changes <= max(added, 1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(browser, lab, scheme):
    """By at least 4.5 to 1, as WCAG's level AA asks for."""
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    enter(page, lab)
    message = {
        "role": "assistant",
        "content": "MTP `code` assistant draft copy\n\n> quote\n",
        "reasoning": "Hm.",
        "thoughts": [["mtp", 2]],
        "sources": [
            ["mtp", 4],
            [None, 7],
            ["assistant", 10],
            ["draft_model", 6],
            ["prompt_lookup", 5],
        ],
        "state": "error",
        "error": "It failed.",
    }
    for name in ("Server", "Live", "Bench", "Chat"):
        if name == "Chat":
            show(page, {"role": "user", "content": "Hi"}, message)
        visit(page, name)
        expect(page.locator(f"#{name.lower()}")).to_be_visible()
        assert page.evaluate(FAINT_TEXTS) == [], name
    context.close()


# Texts that are seen, not disabled, and nearer to their background than 4.5 to 1.
FAINT_TEXTS = """() => {
    const canvas = document.createElement("canvas").getContext("2d");
    const rgba = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map((v) => v / 255)
            .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const found = rgba(getComputedStyle(e).backgroundColor);
            if (found[3] > 250) return found;
        }
        return rgba(getComputedStyle(document.body).backgroundColor);
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; (node = walker.nextNode()); ) {
        const e = node.parentElement;
        if (!node.data.trim() || !e.checkVisibility()) continue;
        if (e.closest(":disabled, .unseen, svg, option")) continue;
        const [one, other] = [light(rgba(getComputedStyle(e).color)), light(behind(e))];
        const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        if (ratio < 4.5) found.push([node.data.trim(), e.className, ratio]);
    }
    return found;
}"""


def test_every_control_has_a_name(page, lab):
    ready(page, lab)
    show(page, {"role": "user", "content": "Hi"})
    page.locator("#settings").click()
    for name in ("Server", "Chat", "Live", "Bench"):
        visit(page, name)
        assert page.evaluate(UNNAMED) == []


UNNAMED = """() =>
    [...document.querySelectorAll("input, select, textarea, button, a")]
        .filter((e) => e.checkVisibility())
        .filter((e) => !(e.labels?.length || e.ariaLabel || e.textContent.trim()))
        .map((e) => e.outerHTML)"""


def test_a_chat_is_had_by_keyboard_alone(page, lab, endless):
    ready(page, lab, str(endless))
    page.set_viewport_size({"width": 375, "height": 700})
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#chat")).to_be_visible()
    for _ in range(40):
        if page.evaluate("document.activeElement.id") == "prompt":
            break
        page.keyboard.press("Tab")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("Write a class")
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_have_text("Stop")
    page.keyboard.press("Escape")
    expect(page.locator(".message.assistant").last).to_contain_text("Stopped.")
