"""Takes the pictures of the Lab that the README shows.

They are of the demo models, in Chromium, at the size of a small laptop's window. Needs
the extra ``test`` and Debian's ``chromium``, or the path of another Chromium.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, ViewportSize, sync_playwright

IMAGES = Path(__file__).parent / "images"
START = "from mlx_optiq_ext.cli import main; main()"
SIZE: ViewportSize = {"width": 1120, "height": 720}
SECONDS = 120.0
QUESTION = "Write a function that reads a file and returns its lines"
RACE = "I need a function that parses the arguments of a command line"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    parser.add_argument("--into", type=Path, default=IMAGES)
    flags = parser.parse_args()
    flags.into.mkdir(exist_ok=True)
    with serve_lab() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=flags.chromium, args=["--no-sandbox"]
        )
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.set_default_timeout(SECONDS * 1000)
        page.goto(url)
        for name, show in (("lab-server", show_server), ("lab-chat", show_chat)):
            show(page)
            file = flags.into / f"{name}.png"
            page.screenshot(path=file, animations="disabled")
            print(f"{file}: {file.stat().st_size / 1000:.0f} kB")
        browser.close()


@contextmanager
def serve_lab() -> Iterator[str]:
    """Start a Lab that knows the demo models only, and yield its address."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", START, "lab", "--port", "0", "--no-browser"],
            stdout=subprocess.PIPE,
            env=os.environ | {"HF_HOME": folder, "PYTHONUNBUFFERED": "1"},
            text=True,
        )
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise SystemExit("the Lab did not start")
            yield found[0]
        finally:
            process.terminate()
            process.wait()


def show_server(page: Page) -> None:
    page.locator("#mtp:checked").wait_for()
    page.locator("#start").click()
    page.locator("#pill[data-status=ready]").wait_for()
    # The other model is examined too by then.
    page.locator("[data-name='demo/gemma'] .tag", has_text="assistant").wait_for()
    page.mouse.move(0, 0)


def show_chat(page: Page) -> None:
    page.get_by_role("link", name="Chat", exact=True).click()
    page.locator("#settings").click()
    for name, value in (("temperature", "0"), ("max_tokens", "90")):
        page.locator(f"#chat-{name}").fill(value)
        page.locator(f"#chat-{name}").blur()
    page.locator("#settings").click()
    page.locator("#prompt").fill(QUESTION)
    page.locator("#send").click()
    page.locator(".message.assistant .tools").wait_for()
    page.locator("#prompt").fill(RACE)
    page.locator("#race").click()
    page.locator(".verdict").wait_for()
    page.locator("#prompt").blur()
    page.mouse.move(0, 0)


if __name__ == "__main__":
    main()
