"""A Lab as a process: what it tells, what it has done, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from mlx_optiq_ext.lab._supervisor import free_port
from tests.helpers import DEMO

from .conftest import TIMEOUT, StartLab, eventually, is_alive


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


ENDLESS = {
    "messages": [{"role": "user", "content": "Write a class"}],
    "max_tokens": 3000,
    "temperature": 0,
}


def chat(lab, **fields):
    body = {"messages": [{"role": "user", "content": "Write a function"}]} | fields
    reply = lab.post("chat", body)
    assert reply.status_code == 200, reply.text
    lines = [x[6:] for x in reply.text.splitlines() if x.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_a_model_of_the_command_line_is_served_with_its_head(start_lab: StartLab):
    lab = start_lab("--model", str(DEMO))
    state = lab.wait_for("state", lambda s: s["status"] in ("ready", "failed"))
    assert state["settings"]["model"] == str(DEMO)
    if state["status"] == "failed":  # Somebody else has the server's usual port.
        assert "port 8080 is in use" in state["problem"]
    else:
        assert state["settings"]["mtp"] is True
    assert lab.close() == -signal.SIGTERM


def test_doctor_says_what_each_model_is(lab, headless):
    found = lab.wait_for("check", lambda c: c["name"] == "demo/qwen")
    assert found["works"]
    assert found["drafter"]["kind"] == "MTP head"
    assert found["memory"]["model_bytes"] > 0
    found = lab.wait_for("check", lambda c: c["name"] == str(headless))
    assert not found["works"]
    assert "extract-mtp" in found["to_do"]
    body = {"model": "demo/gemma", "drafter": "demo/gemma-assistant"}
    found = lab.post("check", body).json()
    assert found["works"]
    body = {"model": "demo/qwen", "drafter": "demo/gemma-assistant"}
    found = lab.post("check", body).json()
    assert not found["works"]
    assert "demo/gemma" not in found["problem"]


def test_what_doctor_refuses_is_not_started(lab, headless):
    lab.start()
    for settings in (
        {"model": str(headless), "mtp": True, "port": free_port()},
        {"model": "demo/qwen", "drafter": "demo/gemma-assistant", "port": free_port()},
    ):
        reply = lab.post("start", settings)
        assert reply.status_code == 409
        assert "Cannot speculate" in reply.json()["error"]["message"]
    assert lab.wait_for("state")["settings"]["model"] == "demo/qwen"
    assert lab.wait_for("state")["status"] == "ready"


def test_a_reply_is_streamed_with_counts(lab, endless):
    lab.start(model=str(endless), api_key="secret", num_draft_tokens=2)
    chunks = chat(lab, max_tokens=24)
    assert sum(len(chunk["choices"]) for chunk in chunks) > 2
    (usage,) = [chunk["usage"] for chunk in chunks if "usage" in chunk]
    assert usage["completion_tokens"] == 24
    timings = chunks[-1]["timings"]
    assert timings["draft_rounds"] > 0
    assert sum(timings["draft_n_per_position"]) == timings["draft_n"]
    assert sum(timings["draft_n_accepted_per_position"]) == timings["draft_n_accepted"]
    assert sum(timings["calls_per_depth"][1:]) == timings["draft_rounds"]


def test_a_reply_that_nobody_reads_any_more_is_ended(lab, endless):
    lab.start(model=str(endless))
    with lab.client.stream("POST", "/api/chat", json=ENDLESS) as reply:
        parts = reply.iter_raw()  # The reply is closed with it.
        next(parts)
        sample = lab.wait_for("sample", lambda s: s["running"] == 1)
    # What is being generated is counted as it is.
    assert lab.wait_for("sample", lambda s: s["running"] == 0)["prompt"] > 0
    assert sample["prompt"] > 0


def test_samples_follow_the_server(lab, endless):
    lab.start(model=str(endless))
    chat(lab, max_tokens=40)
    sample = lab.wait_for("sample", lambda s: s["generated"] >= 41)
    assert sample["memory"] > 1 << 20
    assert sample["arrays"] > 1 << 20
    assert sample["running"] == 0
    assert sum(sample["calls"]) > 0
    pairs = zip(sample["accepted"], sample["drafted"], strict=True)
    assert all(num_accepted <= num_drafted for num_accepted, num_drafted in pairs)
    line = lab.wait_for("lines")[-1]
    assert line["request"]["generated"] == 40


def test_without_a_server_a_message_says_so(lab):
    lab.post("stop", {})
    reply = lab.post("chat", ENDLESS)
    assert reply.status_code == 409
    assert "start one" in reply.json()["error"]["message"]


def test_a_benchmark_pauses_the_server_and_tells_how_far_it_is(lab):
    lab.start()
    assert lab.post("bench", {"max_depth": 1, "tokens": 4}).status_code == 200
    assert lab.post("bench", {}).status_code == 409
    assert lab.post("start", {"model": "demo/qwen"}).status_code == 409
    job = lab.wait_for("bench", lambda j: j["progress"] > 0)
    assert " of 5" in job["lines"][-1]
    assert lab.wait_for("state")["status"] == "stopped"
    job = lab.wait_for("bench", lambda j: j["status"] != "running")
    assert job["status"] == "done"
    assert list(job["result"]["depths"]) == ["1"]
    assert job["about"] == {"model": "demo/qwen", "drafter": "MTP head"}
    lab.wait_until("ready")


def test_a_benchmark_can_be_given_up(lab):
    lab.start()
    assert lab.post("bench", {}).status_code == 200
    assert lab.post("bench/stop", {}).status_code == 200
    assert lab.wait_for("bench")["status"] == "stopped"
    lab.wait_until("ready")


def test_a_benchmark_needs_a_drafter(lab):
    lab.start(mtp=False)
    reply = lab.post("bench", {})
    assert reply.status_code == 409
    assert "drafter" in reply.json()["error"]["message"]


def test_a_download_that_fails_says_why(lab, monkeypatch):
    assert lab.post("download", {"repo_id": "no-such/model"}).status_code == 200
    job = lab.wait_for("download", lambda j: j["status"] != "running")
    assert job["status"] == "failed"
    assert job["lines"]


def test_the_server_ends_with_a_lab_that_is_interrupted(start_lab: StartLab):
    lab = start_lab()
    pid = lab.start()["pid"]
    with lab.client.stream("GET", "/api/events") as reply:  # a page that listens
        parts = reply.iter_raw()
        next(parts)
        lab.process.send_signal(signal.SIGINT)
        lab.process.wait(TIMEOUT)
    assert not is_alive(pid)
    assert "Traceback" not in lab.log.read_text()


def test_the_server_ends_with_a_lab_that_is_killed(start_lab: StartLab):
    lab = start_lab()
    state = lab.start()
    lab.process.kill()
    lab.process.wait(TIMEOUT)
    assert eventually(lambda: not is_alive(state["pid"]))
    port = int(state["url"].rpartition(":")[2])
    assert eventually(lambda: is_free(port))


def test_children_do_not_ask_the_hub(lab, tmp_path):
    environment = Path(f"/proc/{lab.start()['pid']}/environ")
    if environment.exists():
        assert b"HF_HUB_OFFLINE=1" in environment.read_bytes()


def test_two_pages_are_told_the_same(lab):
    lab.start()
    with httpx2.Client(base_url=lab.base, cookies=lab.client.cookies) as other:
        lab.post("stop", {})
        with other.stream("GET", "/api/events") as reply:
            text = ""
            for part in reply.iter_text():
                text += part
                if "event: state" in text and text.endswith("\n\n"):
                    break
    assert '"status": "stopped"' in text


def test_a_server_that_is_killed_comes_back(lab):
    pid = lab.start()["pid"]
    os.kill(pid, signal.SIGKILL)
    state = lab.wait_for("state", lambda s: s["status"] == "ready" and s["pid"] != pid)
    assert state["num_restarts"] == 1


# It takes a while to be read, and the demo model can read no more than 4,096 tokens.
LONG = "Write a function. " * 400


def test_a_reply_that_is_given_up_before_it_has_begun_is_ended(lab, endless):
    lab.start(model=str(endless))
    body = ENDLESS | {"messages": [{"role": "user", "content": LONG}]}
    with pytest.raises(httpx2.ReadTimeout):
        lab.client.post("/api/chat", json=body, timeout=0.02)
    assert lab.wait_for("sample", lambda s: s["running"] == 0 and s["prompt"] > 0)
    assert lab.wait_for("sample")["generated"] < 1000


def test_a_benchmark_pauses_a_server_that_is_to_be_started_again(lab):
    pid = lab.start()["pid"]
    os.kill(pid, signal.SIGKILL)
    lab.wait_until("waiting")
    assert lab.post("bench", {"max_depth": 1, "tokens": 4}).status_code == 200
    lab.wait_until("stopped")
    assert lab.post("bench/stop", {}).status_code == 200
    lab.wait_until("ready")


def test_a_head_that_was_got_meanwhile_is_seen(start_lab: StartLab, tmp_path, headless):
    folder = tmp_path / "model"
    shutil.copytree(headless, folder)
    lab = start_lab("--models", str(tmp_path))
    settings = {"model": str(folder), "mtp": True, "port": free_port()}
    reply = lab.post("start", settings)
    assert reply.status_code == 409
    shutil.copy(DEMO / "model.safetensors", folder)
    assert lab.post("start", settings).status_code == 200
    lab.wait_until("ready")


def test_what_is_pressed_last_counts_while_doctor_is_looking(start_lab: StartLab):
    """The first pair takes doctor a while, and the second was examined before."""
    lab = start_lab()
    lab.wait_for("check", lambda c: c["name"] == "demo/qwen")
    slow = {"model": "demo/gemma", "drafter": "demo/gemma-assistant"}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(lab.post, "start", slow | {"port": free_port()})
        time.sleep(0.2)
        second = lab.post("start", {"model": "demo/qwen", "port": free_port()})
        assert second.status_code == 200
        assert first.result().status_code == 409
        assert lab.wait_until("ready")["settings"]["model"] == "demo/qwen"
        first = pool.submit(lab.post, "start", slow | {"port": free_port()})
        time.sleep(0.2)
        assert lab.post("stop", {}).status_code == 200
        first.result()
    assert lab.wait_for("state")["status"] == "stopped"


def test_a_lab_that_is_interrupted_at_once_says_one_line_of_it(start_lab: StartLab):
    for seconds in (0, 0.4, 1.2):
        lab = start_lab()
        time.sleep(seconds)
        lab.process.send_signal(signal.SIGINT)
        assert lab.process.wait(TIMEOUT) is not None
        assert lab.log.read_text() == "Stopped.\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_runs_beside_the_server_ends_with_the_lab_too(start_lab, number):
    lab = start_lab()
    lab.start()
    assert lab.post("bench", {}).status_code == 200
    lab.wait_for("bench", lambda job: job["lines"])
    children = subprocess.check_output(
        ["ps", "-o", "pid=", "--ppid", str(lab.process.pid)], text=True
    ).split()
    assert children
    lab.process.send_signal(number)
    lab.process.wait(TIMEOUT)
    assert eventually(lambda: not any(is_alive(int(pid)) for pid in children))
