"""Sends a server many requests that are none, and sees that it stays what it was.

Everything stays on the loopback interface. A seed makes a run repeatable.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

from _served import (
    HOST,
    Baseline,
    Served,
    add_flags,
    check_speculation,
    finish,
    speculation_flags,
)

TIMEOUT = 30.0
# Requests until nothing is larger than what was there before.
WARM_UP = 3000

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "Write a function."}]},
    {"role": "assistant", "content": "def f():"},
    {"role": "user", "content": "more"},
]
SCHEMA = {"type": "object", "properties": {"x": {"type": ["string", "null"]}}}
ANTHROPIC_TOOLS = [{"name": "f", "description": "", "input_schema": SCHEMA}]
OPENAI_TOOLS = [
    {"type": "function", "name": "f", "parameters": SCHEMA},
    {"type": "custom", "name": "g", "format": {"type": "text"}},
    {"type": "namespace", "name": "n", "tools": []},
]
CHAT_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT_MESSAGES = [
    *MESSAGES,
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"},
    {"role": "tool", "tool_call_id": "c", "content": "x"},
    {"role": "developer", "content": "be quick"},
]
BLOCKS = [
    {"type": "thinking", "thinking": "hm", "signature": ""},
    {"type": "tool_use", "id": "c", "name": "f", "input": {}},
]
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": [], "is_error": True}
SAMPLING = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "seed": None,
    "stream": True,
    "num_draft_tokens": 2,
}

REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/messages": {
        "model": "claude-x",
        "max_tokens": 2,
        "messages": [
            *MESSAGES,
            {"role": "assistant", "content": BLOCKS},
            {"role": "user", "content": [RESULT, {"type": "text", "text": "x"}]},
        ],
        "system": [{"type": "text", "text": "x"}],
        "tools": ANTHROPIC_TOOLS,
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
        "stop_sequences": ["x"],
        **SAMPLING,
    },
    "/v1/messages/count_tokens": {"model": "claude-x", "messages": MESSAGES},
    "/v1/responses": {
        "model": "gpt-x",
        "max_output_tokens": 2,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "x"},
            {"type": "reasoning", "summary": [], "encrypted_content": None},
        ],
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "instructions": "be brief",
        "tools": OPENAI_TOOLS,
        "tool_choice": "auto",
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}},
        "store": False,
        **SAMPLING,
    },
    "/v1/responses/input_tokens": {"model": "gpt-x", "input": "hi"},
    "/v1/chat/completions": {
        "model": "gpt-x",
        "messages": CHAT_MESSAGES,
        "max_tokens": 2,
        "n": 2,
        "tools": CHAT_TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "stop": ["x"],
        "logit_bias": {"5": 1},
        "repetition_penalty": 1.1,
        "logprobs": True,
        "top_logprobs": 2,
        "stream_options": {"include_usage": True},
        **SAMPLING,
    },
    "/v1/completions": {
        "prompt": "def f",
        "max_tokens": 2,
        "n": 2,
        "logprobs": 2,
        "stop": "x",
        **SAMPLING,
    },
}
PATHS = (*REQUESTS, "/", "/v1/models", "/v1/responses/resp_x", "/health", "/é", "//x")
METHODS = ("GET", "PUT", "DELETE", "HEAD", "PATCH", "BREW", "", "G" * 3000)

# A reply of many tokens is no error, but no use either.
LENGTHS = ("max_tokens", "max_output_tokens", "n")


def junk(chance: random.Random) -> Any:
    """Any JSON value, mostly one that nobody wants."""
    return chance.choice(
        [
            None,
            True,
            False,
            0,
            -1,
            3,
            1.5,
            -0.1,
            2**70,
            10**300,
            1e308,
            "",
            "x",
            "\ud800",
            "\x00",
            "😀" * 50,
            "x" * 1000,
            [],
            [[]],
            [None],
            ["x", 1],
            {},
            {"type": "x"},
            {"": None},
            nested(chance.randrange(200)),
        ]
    )


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value] if depth % 2 else {"x": value}
    return value


def mutate(value: Any, chance: random.Random) -> Any:
    """Change something somewhere in a JSON value."""
    if isinstance(value, dict) and value and chance.random() < 0.95:
        name = chance.choice(list(value))
        return _mutate_field(value, name, chance)
    if isinstance(value, list) and value and chance.random() < 0.8:
        index = chance.randrange(len(value))
        value[index] = mutate(value[index], chance)
        return value
    return junk(chance)


def _mutate_field(
    value: dict[str, Any], name: str, chance: random.Random
) -> dict[str, Any]:
    action = chance.random()
    if name in LENGTHS:
        value[name] = chance.choice([0, -1, "2", 1.5, None, [], True, 1])
    elif action < 0.1:
        del value[name]
    elif action < 0.2:
        value[f"{name}x"] = junk(chance)
    else:
        value[name] = mutate(value[name], chance)
    return value


def head(path: str, size: Any, method: str = "POST", extra: str = "") -> bytes:
    lines = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n{extra}"
    return lines.encode() + b"\r\n"


def wrong_fields(chance: random.Random) -> bytes:
    path = chance.choice(list(REQUESTS))
    body = copy.deepcopy(REQUESTS[path])
    for _ in range(chance.randint(1, 3)):
        body = mutate(body, chance)
        if not isinstance(body, dict):
            break
    data = json.dumps(body).encode()
    return head(path + chance.choice(["", "?beta=true"]), len(data)) + data


def fewer_fields(chance: random.Random) -> bytes:
    """A request that is one, unless a field is missing that has to be there."""
    path = chance.choice(list(REQUESTS))
    body = copy.deepcopy(REQUESTS[path])
    for name in chance.sample(list(body), chance.randrange(min(4, len(body)))):
        del body[name]
    data = json.dumps(body).encode()
    return head(path, len(data)) + data


def wrong_bytes(chance: random.Random) -> bytes:
    path = chance.choice(list(REQUESTS))
    data = bytearray(json.dumps(REQUESTS[path]).encode())
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    data = data[: chance.randrange(len(data))] if chance.random() < 0.5 else data
    return head(path, len(data)) + data


def wrong_head(chance: random.Random) -> bytes:
    path = chance.choice(PATHS)
    size = chance.choice(["", "x", "-5", "1e3", "9" * 30, str(1 << 40), "3, 3", "0"])
    extra = chance.choice(
        [
            "",
            "Transfer-Encoding: chunked\r\n",
            "Content-Encoding: gzip\r\n",
            "x" * 70_000,
            "x: y\r\n" * 150,
            "Authorization: Bearer\r\n",
            "Upgrade: websocket\r\n",
            ": \r\n",
        ]
    )
    method = chance.choice(["POST", *METHODS])
    return head(path, size, method, extra)


def no_http(chance: random.Random) -> bytes:
    # An empty line is no request either, but is passed over in silence.
    return b"x" + chance.randbytes(chance.randrange(1, 400)) + b"\r\n\r\n"


def short_body(chance: random.Random) -> bytes:
    path = chance.choice(list(REQUESTS))
    data = json.dumps(REQUESTS[path]).encode()
    return head(path, len(data) + 10) + data


MAKERS: tuple[tuple[Callable[[random.Random], bytes], int], ...] = (
    (wrong_fields, 60),
    (fewer_fields, 15),
    (wrong_bytes, 20),
    (wrong_head, 12),
    (no_http, 5),
    (short_body, 3),
)


# Makers of requests whose end the server has to be told.
SHORT = (wrong_head, no_http, short_body)


def send(served: Served, data: bytes, chance: random.Random, *, is_short: bool) -> str:
    """Send a request in some way, and say what became of it."""
    connection = socket.create_connection((HOST, served.port), timeout=TIMEOUT)
    with connection:
        way = chance.random()
        try:
            is_short |= way < 0.03
            connection.sendall(data[: len(data) // 2] if way < 0.03 else data)
            if way > 0.97:
                _reset(connection)
                return "left"
            if is_short:
                # The server may have answered and gone by now.
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
            reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        except TimeoutError:
            return "timeout"
        except ConnectionError:
            return "cut off"
    return judge(reply)


def _reset(connection: socket.socket) -> None:
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def judge(reply: bytes) -> str:
    """The status of a reply, or what is wrong with it."""
    status_line, _, rest = reply.partition(b"\r\n")
    parts = status_line.split()
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/"):
        return "no reply" if not reply else "no status"
    status = parts[1].decode()
    body = rest.partition(b"\r\n\r\n")[2]
    if status >= "400" and body:
        error = json.loads(body).get("error")
        if not isinstance(error, dict) or not error.get("message"):
            return f"{status} without an error object"
    return status


def answer(served: Served) -> str:
    body = {"model": "claude-x", "max_tokens": 20, "messages": MESSAGES[1:2]}
    body["temperature"] = 0
    status, reply = served.ask("POST", "/v1/messages", body)
    return reply["content"][0]["text"] if status == 200 else f"status {status}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    add_flags(parser)
    arguments = parser.parse_args()
    flags = () if arguments.plain else speculation_flags(arguments.family)
    # Bounded, so that what is kept on purpose does not look like a leak.
    flags += ("--prompt-cache-bytes", "32MB")
    chance = random.Random(arguments.seed)
    makers, weights = zip(*MAKERS, strict=True)
    outcomes: Counter[str] = Counter()
    with Served(arguments.family, *flags) as served:
        expected = answer(served)
        baseline = None
        for number in range(arguments.num_requests):
            if number == min(WARM_UP, arguments.num_requests // 2):
                baseline = Baseline(served)
            (maker,) = chance.choices(makers, weights)
            data = maker(chance)
            outcome = send(served, data, chance, is_short=maker in SHORT)
            outcomes[outcome] += 1
            if outcome not in FINE:
                print(f"{outcome}: {data[:2000]!r}")
        problems = [
            f"{outcomes[kind]} x {kind}" for kind in outcomes if kind not in FINE
        ]
        problems += baseline.problems() if baseline is not None else []
        if answer(served) != expected:
            problems.append(f"{answer(served)!r} is not the answer {expected!r}")
        problems += [] if arguments.plain else check_speculation(served)
        problems += served.tracebacks()
    print(dict(outcomes))
    finish(problems)


# A request may be well-formed by chance; who leaves gets no reply.
FINE = (
    *("200", "204", "400", "404", "405", "408", "411", "413", "414", "415", "426"),
    *("431", "501", "505", "left"),
)


if __name__ == "__main__":
    main()
