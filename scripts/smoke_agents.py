"""Have coding agents use the server: one call of a tool and an answer each.

    npm install @anthropic-ai/claude-code @openai/codex opencode-ai
    python scripts/smoke_agents.py --bin node_modules/.bin

The model says what the prompt tells it to: first it has a file read, which then tells
it what to answer. Drafts are nearly always right, so that speculation takes part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from tests.serving import scripted  # noqa: E402
from tests.serving.conftest import ServerProcess  # noqa: E402
from tests.serving.scripted_drafter import (  # noqa: E402
    START_WITH_DRAFTER,
    make_drafter,
)

ANSWER = "The note was read."
TIMEOUT = 120.0  # seconds
# Agents send some ten thousand words, and a token is a byte here.
MAX_POSITIONS = 1 << 20

CODEX_CONFIG = """
model = "gpt-x"
model_provider = "local"
[model_providers.local]
name = "local"
base_url = "{}/v1"
wire_api = "responses"
"""


@click.command()
@click.option(
    "--bin",
    "folder",
    type=click.Path(path_type=Path),
    default="",
    help="Where the agents are. Default: in the path.",
)
def main(folder: Path) -> None:
    """Run claude, codex and opencode against a server."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "note.txt").write_text(scripted.say(ANSWER))
        (place / "drafter").mkdir()
        server = ServerProcess(
            scripted.make_model(place / "model", max_positions=MAX_POSITIONS),
            place / "server.log",
            *("--draft", str(make_drafter(place / "drafter"))),
            start=START_WITH_DRAFTER,
        )
        try:
            outcomes = [
                run("claude", claude(folder, place), place, server),
                run("codex", codex(folder, place, server), place, server),
                run("opencode", opencode(folder, place, server), place, server),
            ]
        finally:
            server.stop()
    sys.exit(not all(outcomes))


def claude(folder: Path, place: Path) -> list[str]:
    call = scripted.call("Read", {"file_path": str(place / "note.txt")})
    prompt = scripted.say(f"I look. {call}")
    return [str(folder / "claude"), "-p", prompt, "--allowedTools", "Read"]


def codex(folder: Path, place: Path, server: ServerProcess) -> list[str]:
    (place / "config.toml").write_text(CODEX_CONFIG.format(server.url))
    call = scripted.call("exec_command", {"cmd": f"cat {place / 'note.txt'}"})
    prompt = scripted.say(f"I look. {call}")
    options = ["--skip-git-repo-check", "--sandbox", "danger-full-access"]
    return [str(folder / "codex"), "exec", *options, prompt]


def opencode(folder: Path, place: Path, server: ServerProcess) -> list[str]:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{server.url}/v1"},
        "models": {"default_model": {"limit": {"context": 1 << 20, "output": 8000}}},
    }
    config = {"provider": {"local": provider}, "permission": {"*": "allow"}}
    (place / "opencode.json").write_text(json.dumps(config))
    call = scripted.call("read", {"filePath": str(place / "note.txt")})
    prompt = scripted.say(f"I look. {call}")
    return [str(folder / "opencode"), "run", "-m", "local/default_model", prompt]


def run(name: str, command: list[str], place: Path, server: ServerProcess) -> bool:
    """Whether an agent read the note and gave its answer; says so."""
    environment = os.environ | {
        "HOME": str(place),
        "PWD": str(place),
        "CODEX_HOME": str(place),
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": "claude-x",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    num_lines = len(server.output().splitlines())
    process = subprocess.run(
        command,
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    is_answered = process.stdout.strip().endswith(ANSWER)
    print(f"{name}: {'answered' if is_answered else json.dumps(process.stdout)}")
    for line in server.output().splitlines()[num_lines:]:
        if "draft_n" in line:
            print("   ", line.partition("INFO - ")[2])
    if not is_answered:
        print(process.stderr)
    return is_answered


if __name__ == "__main__":
    main()
