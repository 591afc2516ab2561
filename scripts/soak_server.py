"""Keeps a server busy with mixed requests for long, and checks what it answers.

Several clients at once ask by all routes, streamed and not, with tools, with stop
sequences, for several replies and for log probabilities. Some of them leave in the
middle, and some ask for nonsense. What a plain server says, one request after
another, is the right answer. Everything stays on the loopback interface.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from _served import (
    Baseline,
    Served,
    add_flags,
    check_speculation,
    finish,
    speculation_flags,
)

PROMPTS = (
    "Write a function.",
    "Write the Python function `def read(self)` for module io.",
    "Write a class that counts words. " * 5,
    "Hello",
)
NUM_TOKENS = (1, 8, 40)
NUM_DRAFT_TOKENS = (0, 1, 2, 3)
WARM_UP = 20.0

Case = tuple[str, str, int]


class Client:
    """Asks one thing after another until its time is over.

    Args:
        served (Served): Whom to ask.
        expected (dict): What the right answers are.
        seed (int): Decides what is asked.
    """

    def __init__(self, served: Served, expected: dict[Case, str], seed: int):
        self._served = served
        self._expected = expected
        self._chance = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self, deadline: float) -> None:
        while time.monotonic() < deadline and len(self.problems) < 20:
            (name,) = self._chance.choices(list(ACTIONS), list(ACTIONS.values()))
            try:
                getattr(self, name)()
            except Exception as exc:
                self.problems.append(f"{name}: {exc!r}")
            self.outcomes[name] += 1

    def ask(self) -> None:
        """Any of the questions with a known answer, streamed or not."""
        self._compare(self._chance.choice(list(self._expected)))

    def stop(self) -> None:
        """A question whose answer ends before a text that occurs in it."""
        case = self._chance.choice(list(self._expected))
        answer = self._expected[case]
        start = self._chance.randrange(len(answer) + 1)
        sequence = answer[start : start + self._chance.randint(1, 6)]
        if sequence:
            expected = answer.partition(sequence)[0]
            self._compare(case, expected, stop_sequences=[sequence])

    def offer(self) -> None:
        """A question with a tool, of which the demo's template says nothing."""
        case = self._chance.choice([c for c in self._expected if c[0] in TOOLS])
        self._compare(case, tools=[TOOLS[case[0]]])

    def multiply(self) -> None:
        """A question that is to be answered several times, with log probabilities."""
        case = self._chance.choice([c for c in self._expected if c[0] in HAVE_CHOICES])
        num_choices = self._chance.randint(2, 4)
        options = {"logprobs": True, "top_logprobs": 2, "n": num_choices}
        self._compare(case, self._expected[case] * num_choices, **options)

    def _compare(self, case: Case, expected: str | None = None, **options: Any) -> None:
        expected = self._expected[case] if expected is None else expected
        options["num_draft_tokens"] = self._chance.choice(NUM_DRAFT_TOKENS)
        stream = self._chance.random() < 0.5
        found = ask(self._served, case, stream=stream, **options)
        if found != expected:
            self.problems.append(f"{case} {options}: {found!r} is not {expected!r}")

    def leave(self) -> None:
        """Close the connection in the middle of a reply, or before there is one."""
        api = self._chance.choice(list(PATHS))
        body = body_for((api, self._chance.choice(PROMPTS), 400))
        connection = self._served.connect()
        connection.request("POST", PATHS[api], json.dumps(body | {"stream": True}))
        if self._chance.random() < 0.7:
            connection.getresponse().read(self._chance.randrange(1, 2000))
        connection.close()

    def rest(self) -> None:
        """Leave the server to the others, so that one is alone at times."""
        time.sleep(4 * self._chance.random())

    def count(self) -> None:
        prompt = self._chance.choice(PROMPTS)
        body = body_for(("messages", prompt, 1))
        path = "/v1/messages/count_tokens"
        self._expect(self._served.ask("POST", path, body), 200)

    def sample(self) -> None:
        """A reply by chance, with a seed or without."""
        body = body_for(("chat", self._chance.choice(PROMPTS), 20))
        body |= {"temperature": 1.0, "top_p": 0.9, "top_k": 20}
        if self._chance.random() < 0.3:
            body["seed"] = self._chance.randrange(5)
        self._expect(self._served.ask("POST", PATHS["chat"], body), 200)

    def converse(self) -> None:
        """A chain of stored responses."""
        previous = None
        for _ in range(3):
            body = body_for(("responses", self._chance.choice(PROMPTS), 8))
            body["previous_response_id"] = previous
            status, reply = self._served.ask("POST", PATHS["responses"], body)
            self._expect((status, reply), 200)
            previous = reply["id"]
        self._expect(self._served.ask("DELETE", f"/v1/responses/{previous}"), 200)

    def fail(self) -> None:
        """A request that cannot be served."""
        wrong: dict[str, Any] = self._chance.choice(
            [{"temperature": -1}, {"stream": "x"}, {"tools": {}}, {"top_k": -5}]
        )
        api = self._chance.choice(list(PATHS))
        body = body_for((api, "Hello", 5)) | wrong
        if api == "completions" and "tools" in wrong:
            body["prompt"] = 5
        self._expect(self._served.ask("POST", PATHS[api], body), 400)

    def babble(self) -> None:
        """A body that is no JSON, or not all of it."""
        api = self._chance.choice(list(PATHS))
        data = json.dumps(body_for((api, "Hello", 5))).encode()
        end = self._chance.randrange(1, len(data))
        connection = self._served.connect()
        try:
            connection.request("POST", PATHS[api], data[:end])
            reply = connection.getresponse()
            self._expect((reply.status, reply.read()), 400)
        finally:
            connection.close()

    def _expect(self, reply: tuple[int, Any], status: int) -> None:
        if reply[0] != status:
            self.problems.append(f"{reply} is not {status}")


ACTIONS = {
    "ask": 40,
    "stop": 15,
    "offer": 10,
    "multiply": 10,
    "leave": 12,
    "rest": 10,
    "count": 8,
    "sample": 10,
    "converse": 4,
    "fail": 8,
    "babble": 6,
}

PATHS = {
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
    "chat": "/v1/chat/completions",
}


PARAMETERS = {"type": "object", "properties": {"x": {"type": "string"}}}
TOOLS = {
    "messages": {"name": "f", "input_schema": PARAMETERS},
    "responses": {"type": "function", "name": "f", "parameters": PARAMETERS},
    "chat": {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}},
}
HAVE_CHOICES = ("completions", "chat")


def body_for(case: Case) -> dict[str, Any]:
    api, prompt, num_tokens = case
    if api == "responses":
        return {"model": "gpt-x", "input": prompt, "max_output_tokens": num_tokens}
    if api == "completions":
        return {"model": "gpt-x", "prompt": prompt, "max_tokens": num_tokens}
    messages = [{"role": "user", "content": prompt}]
    return {"model": "claude-x", "messages": messages, "max_tokens": num_tokens}


def ask(served: Served, case: Case, *, stream: bool = False, **options: Any) -> str:
    """The text of the reply to a question."""
    connection = served.connect()
    try:
        body = body_for(case) | {"temperature": 0, "stream": stream} | options
        connection.request("POST", PATHS[case[0]], json.dumps(body))
        reply = connection.getresponse()
        if stream:
            return "".join(map(delta, events(reply)))
        return whole(case[0], json.loads(reply.read()))
    finally:
        connection.close()


def events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in reply:
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


def delta(event: dict[str, Any]) -> str:
    if "choices" in event:
        return "".join(map(piece, event["choices"]))
    if event["type"] == "content_block_delta":
        return event["delta"]["text"]
    return event["delta"] if event["type"] == "response.output_text.delta" else ""


def piece(choice: dict[str, Any]) -> str:
    message = choice.get("delta") or choice.get("message") or choice
    return message.get("content") or message.get("text") or ""


def whole(api: str, reply: dict[str, Any]) -> str:
    if api in HAVE_CHOICES:
        return "".join(map(piece, reply["choices"]))
    if api == "messages":
        return "".join(block["text"] for block in reply["content"])
    return "".join(item["content"][0]["text"] for item in reply["output"])


def run(clients: list[Client], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    threads = [threading.Thread(target=c.run, args=(deadline,)) for c in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=6)
    add_flags(parser)
    arguments = parser.parse_args()
    cases = [(api, p, n) for api in PATHS for p in PROMPTS for n in NUM_TOKENS]
    with Served(arguments.family) as served:
        expected = {case: ask(served, case) for case in cases}
    flags = () if arguments.plain else speculation_flags(arguments.family)
    # Bounded, so that what is kept on purpose does not look like a leak.
    flags += ("--prompt-cache-bytes", "32MB")
    with Served(arguments.family, *flags) as served:
        clients = [Client(served, expected, seed) for seed in range(arguments.clients)]
        run(clients, min(WARM_UP, arguments.minutes * 60 / 4))
        baseline = Baseline(served)
        run(clients, arguments.minutes * 60)
        problems = [problem for client in clients for problem in client.problems]
        problems += baseline.problems()
        again = {case: ask(served, case) for case in cases}
        problems += [
            f"{case} has a new answer"
            for case in cases
            if again[case] != expected[case]
        ]
        problems += [] if arguments.plain else check_speculation(served)
        problems += served.tracebacks()
    print(dict(sum((client.outcomes for client in clients), Counter())))
    finish(problems)


if __name__ == "__main__":
    main()
