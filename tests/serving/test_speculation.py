"""Speculation in a served model: the same replies, and what is said about it."""

from __future__ import annotations

import http.client
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from tests.helpers import DEMO
from tests.processes import run_command

from .conftest import START, ServerProcess, Starter, free_port

PROMPT = "To be, or not to be, that is"
QUESTION = "Tell me about the sea and the king."
MESSAGES = [{"role": "user", "content": QUESTION}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ANTHROPIC, RESPONSES = "/v1/messages", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": PROMPT, "max_tokens": 24},
    CHAT: {"messages": MESSAGES, "max_tokens": 24},
    ANTHROPIC: {"model": "claude-x", "messages": MESSAGES, "max_tokens": 24},
    RESPONSES: {
        "model": "gpt-x",
        "input": QUESTION,
        "max_output_tokens": 24,
    },
}
TEXTS = {path: PROMPT if path == COMPLETIONS else QUESTION for path in BODIES}

# What two servers say differently, and what only one that speculates says.
OWN = {"id", "item_id", "call_id", "created", "created_at", "completed_at", "timings"}
OWN |= {"completion_tokens_details"}


class Reply(NamedTuple):
    """Status and events of a reply, one event if it was not streamed."""

    status: int
    events: list[Any]

    @property
    def text(self) -> str:
        """Of any of the routes."""
        if text := "".join(map(_piece, self.events)):
            return text
        if "choices" not in self.events[0]:
            parts = _parts(self.events[0])
            return "".join(part.get("text", "") for part in parts)
        choices = [c for event in self.events for c in event.get("choices", ())]
        return "".join(
            choice.get("text")
            or choice.get("message", {}).get("content")
            or choice.get("delta", {}).get("content")
            or ""
            for choice in choices
        )

    @property
    def last(self) -> Any:
        return self.events[-1]


class Pair(NamedTuple):
    """A server that speculates and one that does not, of the same model."""

    speculating: ServerProcess
    plain: ServerProcess

    def compare(self, path: str, **options: Any) -> Reply:
        """Ask both; what the one that speculates replies."""
        found, expected = (ask(server, path, **options) for server in self)
        assert found.status == expected.status
        for a, b in zip(found.events, expected.events, strict=True):
            assert_same(a, b)
        return found


def _parts(event: Any) -> list[Any]:
    """The parts of a reply that was not streamed, on the same routes."""
    items = event.get("output", [event])
    return [part for item in items for part in item.get("content", ())]


def _piece(event: Any) -> str:
    """The text in an event of the Anthropic or the Responses route."""
    delta = event.get("delta", {})
    if event.get("type") == "content_block_delta":
        return delta.get("text", "")
    return delta if event.get("type") == "response.output_text.delta" else ""


def ask(server: ServerProcess, path: str, **options: Any) -> Reply:
    """The reply to a request that is greedy unless told; None leaves a field out."""
    options = BODIES[path] | {"temperature": 0} | options
    body = {name: value for name, value in options.items() if value is not None}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    if not body.get("stream") or response.status != 200:
        return Reply(response.status, [json.loads(text)])
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return Reply(response.status, [json.loads(d) for d in data if d != "[DONE]"])


def assert_same(found: Any, expected: Any) -> None:
    """Equal up to rounding and to what is each server's own."""
    if isinstance(expected, dict):
        assert found.keys() - OWN == expected.keys() - OWN
        for name in expected.keys() - OWN:
            assert_same(found[name], expected[name])
    elif isinstance(expected, list):
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=2e-3)
    else:
        assert found == expected


def assert_counts_add_up(reply: Reply) -> tuple[int, int]:
    """Check what a reply says of speculation: how much was drafted and accepted."""
    usage, timings = reply.last["usage"], reply.last["timings"]
    details = usage["completion_tokens_details"]
    accepted = details["accepted_prediction_tokens"]
    assert accepted == timings["draft_n_accepted"]
    assert accepted + details["rejected_prediction_tokens"] == timings["draft_n"]
    assert accepted <= usage["completion_tokens"]
    return timings["draft_n"], accepted


def with_text(body: dict[str, Any], text: str) -> dict[str, Any]:
    """A request of any route with another text for the model to go on with."""
    if "messages" in body:
        return body | {"messages": [{"role": "user", "content": text}]}
    return body | {"prompt" if "prompt" in body else "input": text}


@pytest.fixture(autouse=True)
def prompts_of_its_own(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give each test its own prompts, or it would find those of others in a cache."""
    for path, body in BODIES.items():
        text = f"# {request.node.name}\n{TEXTS[path]}"
        monkeypatch.setitem(BODIES, path, with_text(body, text))


@pytest.fixture(scope="module")
def pair(start_server: Starter) -> Pair:
    flags = ("--mtp", "--num-draft-tokens", "3")
    return Pair(start_server(*flags, folder=DEMO), start_server(folder=DEMO))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", BODIES)
def test_every_route_replies_as_without_speculation(
    pair: Pair, path: str, stream: bool
) -> None:
    assert pair.compare(path, stream=stream).status == 200


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_a_reply_ends_at_its_limit(pair: Pair, path: str, num_tokens: int) -> None:
    name = "max_output_tokens" if path == RESPONSES else "max_tokens"
    for stream in (False, True):
        pair.compare(path, stream=stream, **{name: num_tokens})


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, ANTHROPIC])
def test_a_reply_ends_at_every_stop_string(pair: Pair, path: str) -> None:
    text = pair.compare(path).text
    name = "stop_sequences" if path == ANTHROPIC else "stop"
    for start, size in ((1, 1), (3, 3), (7, 9), (12, 2)):
        stops = [text[start : start + size]]
        for stream in (False, True):
            # An Anthropic stop sequence has to have more than white space.
            if path != ANTHROPIC or stops[0].strip():
                pair.compare(path, stream=stream, **{name: stops})


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 1},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"repetition_penalty": 1.2, "repetition_context_size": 3},
        {"logit_bias": {"5": 4.0, "300": -50.0}},
        {"top_p": 0.5, "top_k": 3, "min_p": 0.1},
        {"stream_options": {"include_usage": True}},
    ],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_sampling_fields_mean_what_they_do_without_speculation(
    pair: Pair, path: str, options: dict[str, Any]
) -> None:
    for stream in (False, True):
        pair.compare(path, stream=stream, **options)


@pytest.mark.parametrize("path", [ANTHROPIC, RESPONSES])
def test_penalties_and_biases_count_on_the_other_routes(pair: Pair, path: str) -> None:
    texts = {
        pair.compare(path, stream=True, **options).text
        for options in (
            {},
            {"repetition_penalty": 2.5},
            {"presence_penalty": 4.0, "frequency_penalty": 6.0},
            {"logit_bias": {"300": 50.0}},
        )
    }
    assert len(texts) > 2


def test_the_most_probable_tokens_are_those_without_speculation(pair: Pair) -> None:
    found, expected = (
        ask(server, CHAT, logprobs=True, top_logprobs=4) for server in pair
    )
    pairs = zip(_top(found), _top(expected), strict=True)
    # mlx-lm leaves them in no order.
    for a, b in pairs:
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, abs=2e-3)


def _top(reply: Reply) -> list[dict[int, float]]:
    content = reply.last["choices"][0]["logprobs"]["content"]
    return [{top["id"]: top["logprob"] for top in i["top_logprobs"]} for i in content]


@pytest.mark.parametrize("num_draft_tokens", range(5))
def test_a_request_says_how_much_to_draft(pair: Pair, num_draft_tokens: int) -> None:
    reply = pair.compare(COMPLETIONS, num_draft_tokens=num_draft_tokens)
    num_drafted, _ = assert_counts_add_up(reply)
    assert (num_drafted > 0) == (num_draft_tokens > 0)


def test_drafts_of_some_tokens_change_no_reply(
    pair: Pair, start_server: Starter
) -> None:
    flags = ("--mtp", "--num-draft-tokens", "3", "--draft-vocab", "32")
    limited = start_server(*flags, folder=DEMO)
    plain, all_, some = (
        ask(server, COMPLETIONS, prompt="class Stack:\n    def push(")
        for server in (pair.plain, pair.speculating, limited)
    )
    for reply in (all_, some):
        assert_same(reply.last, plain.last)
    (num_drafted, num_accepted), found = map(assert_counts_add_up, (all_, some))
    assert found[1] / found[0] < num_accepted / num_drafted


def test_more_draft_tokens_than_can_be_had_are_refused(pair: Pair) -> None:
    reply = ask(pair.speculating, CHAT, num_draft_tokens=9)
    assert reply.status == 400
    assert reply.last["error"]["param"] == "num_draft_tokens"


def test_a_seed_gives_one_text_and_another_gives_another(pair: Pair) -> None:
    texts = [
        ask(pair.speculating, CHAT, temperature=1.0, seed=seed).text
        for seed in (1, 2, 1)
    ]
    assert texts[0] == texts[2] != texts[1]


def test_replies_of_one_request_are_those_of_its_seeds(pair: Pair) -> None:
    for options in ({}, {"xtc_probability": 0.5}):
        fields: dict[str, Any] = {"temperature": 1.0} | options
        several = ask(pair.speculating, COMPLETIONS, seed=5, n=4, **fields)
        texts = [choice["text"] for choice in several.events[0]["choices"]]
        singles = [
            ask(pair.speculating, COMPLETIONS, seed=seed, **fields).text
            for seed in range(5, 9)
        ]
        assert texts == singles
        assert len({*texts}) > 1


def test_a_request_with_a_seed_speculates(pair: Pair) -> None:
    reply = pair.compare(CHAT, seed=1)
    assert assert_counts_add_up(reply)[0] > 0


@pytest.mark.parametrize("path", BODIES)
def test_concurrent_requests_give_the_texts_of_single_ones(
    pair: Pair, path: str
) -> None:
    cases = [_nth_case(path, number) for number in range(8)]
    expected = [ask(pair.plain, each, **body) for each, body in cases]
    with ThreadPoolExecutor(8) as pool:
        found = [
            *pool.map(lambda case: ask(pair.speculating, case[0], **case[1]), cases)
        ]
    for one, other, (each, body) in zip(found, expected, cases, strict=True):
        assert one.text == other.text
        assert one.text
        if each in (COMPLETIONS, CHAT) and "stream" not in body:
            assert_counts_add_up(one)


def _nth_case(path: str, number: int) -> tuple[str, dict[str, Any]]:
    """Requests of one route, streamed and not, with others among them."""
    route = path if number % 4 else CHAT
    limit = "max_output_tokens" if route == RESPONSES else "max_tokens"
    text = PROMPT[: 6 + number]
    body: dict[str, Any] = {limit: 8 + 5 * number}
    if route == COMPLETIONS:
        body["prompt"] = text
    elif route == RESPONSES:
        body["input"] = text
    else:
        body["messages"] = [{"role": "user", "content": text}]
    return route, body | ({"stream": True} if number % 2 else {})


@pytest.mark.parametrize("seed", [{}, {"seed": 5}], ids=["batch", "single"])
def test_a_second_turn_finds_the_cache_and_a_primed_head(
    pair: Pair, start_server: Starter, seed: dict[str, int]
) -> None:
    text = f"What did the old man say to the {'girl' if seed else 'boy'}?"
    question = {"role": "user", "content": text}
    first = pair.compare(CHAT, messages=[question], max_tokens=48, **seed)
    answer = {"role": "assistant", "content": first.text}
    messages = [question, answer, {"role": "user", "content": "And what then?"}]
    second = pair.compare(CHAT, messages=messages, max_tokens=48, **seed)
    assert second.last["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    # A head that saw the whole conversation at once.
    fresh = start_server("--mtp", "--num-draft-tokens", "3", folder=DEMO)
    afresh = ask(fresh, CHAT, messages=messages, max_tokens=48, **seed)
    fresh.stop()
    assert afresh.text == second.text
    rates = []
    for reply in (second, afresh):
        num_drafted, num_accepted = assert_counts_add_up(reply)
        rates.append(num_accepted / num_drafted)
    assert rates[0] == pytest.approx(rates[1], abs=0.1)


def test_a_client_that_leaves_frees_its_row(pair: Pair) -> None:
    body = BODIES[CHAT] | {"stream": True, "max_tokens": 4000, "temperature": 0}
    expected = ask(pair.plain, CHAT)
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", pair.speculating.port)
        connection.request("POST", CHAT, json.dumps(body))
        response = connection.getresponse()
        response.readline()
        response.close()
        connection.close()
        found = ask(pair.speculating, CHAT)
        assert found.text == expected.text
    # Alone again, which it would not be if their rows were still there.
    assert assert_counts_add_up(found)[0] > 0


@pytest.mark.parametrize("seed", [{}, {"seed": 5}], ids=["batch", "single"])
def test_a_reply_that_was_cut_off_leaves_a_valid_cache(
    pair: Pair, seed: dict[str, int]
) -> None:
    prompt = f"def cancelled_{len(seed)}(self, path):\n"
    body = BODIES[COMPLETIONS] | {"prompt": prompt, "max_tokens": 3000}
    body |= {"stream": True, "temperature": 0} | seed
    for num_events in (1, 6, 17):
        port = pair.speculating.port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", COMPLETIONS, json.dumps(body))
        response = connection.getresponse()
        lines = (line for line in response if line.startswith(b"data: {"))
        events = [json.loads(line[6:]) for line in islice(lines, num_events)]
        response.close()
        connection.close()
        said = Reply(200, events).text
        assert said
        for text in (prompt, prompt + said, prompt + said[:2]):
            found, expected = (
                ask(server, COMPLETIONS, prompt=text, **seed) for server in pair
            )
            assert found.text == expected.text


@pytest.mark.parametrize("seed", [{}, {"seed": 5}], ids=["batch", "single"])
def test_a_prompt_may_be_all_in_the_cache(pair: Pair, seed: dict[str, int]) -> None:
    prompt = f"class Known{len(seed)}:\n    def"
    # How much of it is in the cache depends on whether a batch decoded it.
    expected = ask(pair.plain, COMPLETIONS, prompt=prompt, **seed).text
    assert ask(pair.speculating, COMPLETIONS, prompt=prompt, **seed).text == expected
    # What is kept of a prompt is all of it but its last token.
    for server in pair:
        ask(server, COMPLETIONS, prompt=f"{prompt} get", max_tokens=1)
    for server in pair:
        found = ask(server, COMPLETIONS, prompt=prompt, **seed)
        usage = found.last["usage"]
        assert found.text == expected
        num_cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert num_cached < usage["prompt_tokens"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Low-rank weights for the demo model that change what it says."""
    folder = tmp_path_factory.mktemp("adapter")
    settings = {"rank": 4, "scale": 8.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model, _ = load_model(DEMO)
    linear_to_lora_layers(model, 4, settings)
    keys = mx.random.split(mx.random.key(3), 1000)
    weights = {
        name: mx.random.normal(value.shape, key=key) * 0.05
        for key, (name, value) in zip(
            keys, tree_flatten(model.parameters()), strict=False
        )
        if "lora_" in name
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    return folder


def test_an_adapter_changes_the_target_and_not_the_exactness(
    pair: Pair, adapter: Path
) -> None:
    base = pair.compare(CHAT)
    adapted = pair.compare(CHAT, adapters=str(adapter), model=str(DEMO) + "/")
    assert adapted.text != base.text
    assert assert_counts_add_up(adapted)[0] > 0
    again = pair.compare(CHAT)
    assert again.text == base.text
    assert assert_counts_add_up(again)[0] > 0


def test_an_adapter_is_applied_by_whatever_name_the_served_model_is_called(
    pair: Pair, adapter: Path, tmp_path: Path
) -> None:
    for name in (None, "default_model", str(DEMO), "gpt-x"):
        for path in BODIES:
            model = {} if name is None else {"model": name}
            found = pair.compare(path, adapters=str(adapter), **model)
            assert found.text != pair.compare(path, **model).text
            for server in pair:
                missing = ask(server, path, adapters=str(tmp_path / "no"), **model)
                assert missing.status == 404


COUNT_SEARCHES = f"""
from mlx_lm.generate import BatchGenerator
find = BatchGenerator._find_uids
def counting(self, uids):
    print(f"searched {{len(list(uids))}}\\n", end="", flush=True)
    return find(self, uids)
BatchGenerator._find_uids = counting
{START}
"""


def test_no_request_searches_for_all_that_were_served(start_server: Starter) -> None:
    server = start_server("--mtp", folder=DEMO, start=COUNT_SEARCHES)
    for number in range(20):
        ask(server, COMPLETIONS, prompt=f"x = {number}", max_tokens=2)
    sizes = [int(size) for size in re.findall(r"searched (\d+)\n", server.output())]
    assert len(sizes) >= 20
    assert max(sizes) <= 4


def test_a_quantised_cache_is_speculated_on(start_server: Starter) -> None:
    flags = ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0")
    pair = Pair(
        start_server(*flags, "--mtp", folder=DEMO), start_server(*flags, folder=DEMO)
    )
    for stream in (False, True):
        pair.compare(CHAT, stream=stream)
    reply = pair.compare(COMPLETIONS, num_draft_tokens=2)
    assert assert_counts_add_up(reply)[0] > 0


BROKEN_ONCE = f"""
from mlx_optiq_ext.decoding._loop import Loop
turn, calls = Loop.turn, []
def broken(self):
    calls.append(self)
    if len(calls) == 3:
        raise RuntimeError("broken on purpose")
    return turn(self)
Loop.turn = broken
{START}
"""


def test_a_round_that_fails_ends_its_request_and_not_the_server(
    start_server: Starter, pair: Pair
) -> None:
    server = start_server("--mtp", folder=DEMO, start=BROKEN_ONCE)
    assert ask(server, CHAT).status == 500
    assert ask(server, CHAT).text == ask(pair.plain, CHAT).text


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model without its head."""
    folder = tmp_path_factory.mktemp("headless")
    for path in DEMO.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, folder)
    weights = mx.load(str(DEMO / "model.safetensors"))
    trunk = {name: w for name, w in weights.items() if "mtp." not in name}
    assert len(trunk) < len(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), trunk, {"format": "mlx"})
    return folder


def start_in_vain(*flags: str) -> tuple[int, str]:
    """Exit status and output of a server that does not start."""
    result = run_command("server", "--port", free_port(), *flags)
    return result.code, result.output + result.error


def test_a_model_without_a_head_fails_at_start(headless: Path) -> None:
    status, output = start_in_vain("--model", str(headless), "--mtp")
    assert status not in (0, 2)
    assert "Cannot speculate" in output
    assert str(headless) in output
    assert "Traceback" not in output


def test_two_ways_to_speculate_are_refused() -> None:
    status, output = start_in_vain("--model", str(DEMO), "--mtp", "--draft", "x")
    assert status == 2
    assert "not allowed with" in output
