"""A server reports on its requests in the log and to Prometheus."""

from __future__ import annotations

import http.client
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers import DEMO

from .conftest import START, ServerProcess, Starter
from .test_faults import eventually
from .test_speculation import BODIES, CHAT, COMPLETIONS, ask

WITHOUT_CLIENT = f"import sys; sys.modules['prometheus_client'] = None; {START}"

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def get(server: ServerProcess, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", "/metrics", headers=headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def samples(server: ServerProcess) -> Samples:
    status, text = get(server)
    assert status == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def num_answered(found: Samples) -> float:
    """Requests for completions."""
    return sum(
        value
        for (name, labels), value in found.items()
        if name == "requests_total" and dict(labels)["route"] in (CHAT, COMPLETIONS)
    )


@pytest.fixture(scope="module")
def measured(start_server: Starter) -> ServerProcess:
    return start_server("--mtp", "--num-draft-tokens", "2", folder=DEMO)


def test_requests_and_tokens_are_counted(measured: ServerProcess) -> None:
    before = samples(measured)
    num_before = num_answered(before)
    replies = [ask(measured, path) for path in (COMPLETIONS, CHAT, CHAT)]
    assert ask(measured, CHAT, num_draft_tokens=9).status == 400
    assert eventually(lambda: num_answered(samples(measured)) == num_before + 4)
    found = samples(measured)

    def growth(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return found[key] - before.get(key, 0)

    usages = [reply.last["usage"] for reply in replies]
    timings = [reply.last["timings"] for reply in replies]
    num_accepted = sum(t["draft_n_accepted"] for t in timings)
    assert growth("requests_total", route=CHAT, status="200") == 2
    assert growth("requests_total", route=CHAT, status="400") == 1
    assert growth("prompt_tokens_total") == sum(u["prompt_tokens"] for u in usages)
    assert growth("generation_tokens_total") == sum(
        u["completion_tokens"] for u in usages
    )
    assert growth("time_to_first_token_seconds_count") == 3
    assert growth("e2e_request_latency_seconds_count") == 3
    assert growth("spec_decode_num_drafts_total") > 0
    assert growth("spec_decode_num_draft_tokens_total") == sum(
        t["draft_n"] for t in timings
    )
    assert growth("spec_decode_num_accepted_tokens_total") == num_accepted
    name = "spec_decode_num_accepted_tokens_per_pos_total"
    at = [growth(name, position=position) for position in "01"]
    assert sum(at) == num_accepted
    assert at[0] >= at[1]
    drafted = [
        growth("spec_decode_num_draft_tokens_per_pos_total", position=position)
        for position in "01"
    ]
    assert sum(drafted) == sum(t["draft_n"] for t in timings)
    name = "spec_decode_num_target_calls_per_depth_total"
    calls = [growth(name, depth=depth) for depth in "012"]
    assert sum(calls[1:]) == growth("spec_decode_num_drafts_total")
    assert sum(t["draft_rounds"] for t in timings) == sum(calls[1:])
    assert found["mlx_active_memory_bytes", ()] > 0
    assert found["mlx_peak_memory_bytes", ()] >= found["mlx_active_memory_bytes", ()]
    assert found["num_requests_running", ()] == 0
    assert found["num_requests_waiting", ()] == 0


@pytest.mark.parametrize("path", BODIES)
def test_a_request_leaves_one_line(measured: ServerProcess, path: str) -> None:
    pattern = rf"{path} 200: \d+ prompt tokens .*, 24 generated, [\d.]+ tokens/s, "
    pattern += r"draft_n \d+, accepted \d+"
    num_lines = len(re.findall(pattern, measured.output()))
    ask(measured, path)
    # It is written after the reply.
    assert eventually(
        lambda: len(re.findall(pattern, measured.output())) == num_lines + 1
    )


def test_routes_are_named_by_their_paths(measured: ServerProcess) -> None:
    for method, path in (
        ("HEAD", "/"),
        ("OPTIONS", "/v1/messages"),
        ("GET", "/v1/models/a/b"),
        ("GET", "/responses/x/input_items"),
        ("HEAD", "/health"),
        ("GET", "/no/such/path"),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", measured.port, timeout=20)
        connection.request(method, path)
        connection.getresponse().read()
        connection.close()
    expected = {"/", "/{path}", "/v1/models/{path}", "/health", "other"}
    expected |= {"/v1/responses/{id}/input_items"}

    def routes() -> set[str]:
        names = (dict(labels).get("route") for _, labels in samples(measured))
        return {name for name in names if name is not None}

    assert eventually(lambda: expected <= routes())
    assert all(re.fullmatch(r"(/[\w{}]*)+|other|\*", name) for name in routes())


def test_metrics_need_the_key_of_the_server(start_server: Starter) -> None:
    server = start_server("--api-key", "secret")
    assert get(server)[0] == 401
    assert get(server, Authorization="Bearer secret")[0] == 200


def test_without_the_package_a_server_says_what_is_missing(
    start_server: Starter,
) -> None:
    server = start_server(start=WITHOUT_CLIENT)
    status, text = get(server)
    assert status == 501
    assert "mlx-optiq-ext[metrics]" in text
