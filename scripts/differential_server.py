"""Sends a server and mlx-lm's own the same requests, and compares what they say.

python scripts/differential_server.py [--requests N] [--seed N] [--speculate]
    [--family gemma --clients 1] [--control]

The requests are greedy and well formed, for chat completions and for completions. Text,
tokens with their log probabilities, numbers of tokens and the reason of the end have to
be equal. Two things are known to differ, and are kept out of the comparison:

- A stop sequence ends the text where it first occurs, which mlx-lm's own server finds
  only if the model spells it with certain tokens. What is expected is what that server
  says without it, up to there.
- A penalty of a request with a seed does not see, in that server, the part of a prompt
  that is in the cache. Such a prompt begins with a number that no other begins with.

Where rows of a batch are padded, as those of Gemma-4, the last bits of probabilities
depend on what else is in the batch, in mlx-lm's own server as well: ``--control`` shows
it. With one client nothing is left to chance.
"""

from __future__ import annotations

import argparse
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from _served import Served, finish, speculation_flags

PATHS = ("/v1/chat/completions", "/v1/completions")
TEXTS = (
    "def read_lines(path):\n",
    "class Stack:\n    def push(self, item):\n",
    "To be, or not to be, that is",
    "import os\n\n",
    "Write a function that adds two numbers.",
    "What is the name of the king?",
    "for item in items:\n    if item",
    "é ü 日本 \U0001f600 ...",
)
STOPS = ("\n", "e", " the", "self", "return", "in", "zzz", ":\n", "def")
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}


class Said(NamedTuple):
    """What of a reply has to be equal."""

    status: int
    text: str
    reason: str | None
    usage: tuple[int, ...]
    logprobs: tuple[Any, ...]


def make_request(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """A path, and a body that any server of the API understands."""
    path = chance.choice(PATHS)
    length = chance.choice(("max_tokens", "max_completion_tokens"))
    body: dict[str, Any] = {"temperature": 0.0, length: chance.randint(1, 24)}
    options: dict[str, Any] = {
        "frequency_penalty": 0.5,
        "logit_bias": {str(chance.randrange(200)): 5.0},
        "logprobs": True,
        "min_p": 0.05,
        "presence_penalty": 0.5,
        "repetition_context_size": 5,
        "repetition_penalty": 1.3,
        "seed": chance.randrange(100),
        "stop": chance.sample(STOPS, chance.randint(1, 3)),
        "stream": True,
        "top_k": 20,
        "top_logprobs": chance.randint(1, 10),
        "top_p": 0.9,
    }
    for name in chance.sample(sorted(options), chance.randrange(6)):
        body[name] = options[name]
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}
    is_alone = "seed" in body and any("penalty" in name for name in body)
    start = f"{chance.randrange(10**9)} " if is_alone else ""
    if path == "/v1/completions":
        body["prompt"] = start + chance.choice(TEXTS) + chance.choice(TEXTS)
    else:
        body["messages"] = make_messages(chance, start)
        if chance.random() < 0.2:
            body["tools"] = [TOOL]
    return path, body


def make_messages(chance: random.Random, start: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if start or chance.random() < 0.5:
        messages.append({"role": "system", "content": f"{start}Be brief."})
    for _ in range(chance.randrange(4)):
        messages.append({"role": "user", "content": chance.choice(TEXTS)})
        if chance.random() < 0.2:
            arguments = json.dumps({"a": chance.randrange(9)})
            function = {"name": "add", "arguments": arguments}
            call = {"id": "1", "type": "function", "function": function}
            messages.append(
                {"role": "assistant", "content": None, "tool_calls": [call]}
            )
            messages.append({"role": "tool", "tool_call_id": "1", "content": "5"})
        messages.append({"role": "assistant", "content": chance.choice(TEXTS)})
    content: Any = chance.choice(TEXTS)
    if chance.random() < 0.3:
        content = [{"type": "text", "text": content}]
    return [*messages, {"role": "user", "content": content}]


def ask(served: Served, path: str, body: dict[str, Any]) -> Said:
    connection = served.connect()
    try:
        connection.request("POST", path, json.dumps(body))
        reply = connection.getresponse()
        data = reply.read().decode()
    finally:
        connection.close()
    if not body.get("stream"):
        return read_reply(reply.status, [json.loads(data)])
    lines = [line[6:] for line in data.splitlines() if line.startswith("data: {")]
    return read_reply(reply.status, [json.loads(line) for line in lines])


def read_reply(status: int, events: list[dict[str, Any]]) -> Said:
    choices = [choice for event in events for choice in event.get("choices", [])]
    usage: dict[str, int] = next(
        (event["usage"] for event in events if "usage" in event), {}
    )
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return Said(
        status,
        "".join(map(text_of, choices)),
        next((c["finish_reason"] for c in choices[::-1] if c["finish_reason"]), None),
        tuple(usage.get(name, -1) for name in names),
        tuple(entry for choice in choices for entry in logprobs_of(choice)),
    )


def text_of(choice: dict[str, Any]) -> str:
    message = choice.get("message") or choice.get("delta") or choice
    thought = message.get("reasoning") or ""
    return thought + (message.get("content") or message.get("text") or "")


def logprobs_of(choice: dict[str, Any]) -> list[Any]:
    content = (choice.get("logprobs") or {}).get("content", [])
    # Which is first among those that are equally likely is not said, and with them
    # mlx-lm's server does not say which one the token is.
    return [
        (
            sorted((each["logprob"] for each in entry["top_logprobs"]), reverse=True)
            if entry.get("top_logprobs")
            else (entry["id"], entry["logprob"])
        )
        for entry in content
    ]


def expected_of(stock: Served, path: str, body: dict[str, Any]) -> Said:
    """What mlx-lm's server says, or would if it found stop sequences."""
    said = ask(stock, path, {name: body[name] for name in body if name != "stop"})
    # The sequence that is complete first ends the text.
    found = [
        (start + len(stop), start)
        for stop in body.get("stop", ())
        if (start := said.text.find(stop)) >= 0
    ]
    if not found:
        return said
    return said._replace(text=said.text[: min(found)[1]], reason="stop")


def compare(served: Served, stock: Served, path: str, body: dict[str, Any]) -> str:
    """What is wrong with a reply, empty if nothing is."""
    expected, found = expected_of(stock, path, body), ask(served, path, body)
    if body.get("stream"):
        # mlx-lm's server streams none.
        found = found._replace(logprobs=expected.logprobs)
    if expected.reason == "stop" and "stop" in body:
        found = found._replace(usage=expected.usage, logprobs=expected.logprobs)
    if found == expected:
        return ""
    return f"{path} {json.dumps(body)}\n  found    {found}\n  expected {expected}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", default="qwen")
    parser.add_argument("--speculate", action="store_true")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument(
        "--control", action="store_true", help="compare mlx-lm's server with itself"
    )
    args = parser.parse_args()
    chance = random.Random(args.seed)
    flags = speculation_flags(args.family) if args.speculate else ()
    requests = [make_request(chance) for _ in range(args.requests)]
    with (
        Served(args.family, *flags, off=args.control) as served,
        Served(args.family, off=True) as stock,
    ):
        with ThreadPoolExecutor(args.clients) as pool:
            found = pool.map(lambda each: compare(served, stock, *each), requests)
            problems = [problem for problem in found if problem]
        problems += served.tracebacks()
    print(f"{args.requests} requests compared, {len(problems)} problems")
    finish(problems)


if __name__ == "__main__":
    main()
