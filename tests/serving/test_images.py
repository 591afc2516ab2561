"""Prompts with images, which mlx-lm decodes one by one, speculatively here."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from mlx_lm import server
from PIL import Image

from .conftest import Starter
from .scripted import call, make_model, say
from .test_spans import start_pair
from .test_speculation import ANTHROPIC, CHAT, RESPONSES, Pair, assert_counts_add_up

pytestmark = pytest.mark.skipif(
    not hasattr(server, "_inline_image_urls"), reason="this mlx-lm takes no images"
)

TEXT = f"a square{call('f', {'x': 1})}and no more STOP x"


@pytest.fixture(scope="module")
def pair(start_server: Starter, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model = make_model(tmp_path_factory.mktemp("model"), takes_images=True)
    place = tmp_path_factory.mktemp("drafter")
    return start_pair(start_server, place, folder=model)


def picture(num_tokens: int, colour: str = "red") -> str:
    """An image for which the model gets so many tokens, in base64."""
    file = io.BytesIO()
    Image.new("RGB", (28 * num_tokens, 28), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def request(path: str, data: str) -> dict[str, Any]:
    url = f"data:image/png;base64,{data}"
    source = {"type": "base64", "media_type": "image/png", "data": data}
    image, kind = {
        CHAT: ({"type": "image_url", "image_url": {"url": url}}, "text"),
        ANTHROPIC: ({"type": "image", "source": source}, "text"),
        RESPONSES: ({"type": "input_image", "image_url": url}, "input_text"),
    }[path]
    content = [image, {"type": kind, "text": say(TEXT)}]
    messages = [{"role": "user", "content": content}]
    if path == RESPONSES:
        return {"input": messages, "max_output_tokens": 100}
    return {"messages": messages, "max_tokens": 100}


def num_prompt_tokens(usage: dict[str, Any]) -> int:
    if "prompt_tokens" in usage:
        return usage["prompt_tokens"]
    return usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)


@pytest.mark.parametrize("path", [CHAT, ANTHROPIC, RESPONSES])
def test_a_reply_to_an_image_is_that_without_speculation(pair: Pair, path: str) -> None:
    options = {"num_draft_tokens": 4}
    lengths = []
    for data in (picture(1), picture(3)):
        pair.compare(path, **request(path, data), **options, stream=True)
        reply = pair.compare(path, **request(path, data), **options)
        lengths.append(num_prompt_tokens(reply.last["usage"]))
    assert lengths[1] - lengths[0] == 2
    if path == CHAT:
        _, num_accepted = assert_counts_add_up(reply)
        assert num_accepted > 10


def test_only_the_same_image_is_found_in_the_cache(pair: Pair) -> None:
    first = request(CHAT, picture(2))
    pair.compare(CHAT, **first)
    later = [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "b"}]
    turn = first | {"messages": [*first["messages"], *later]}
    usage = pair.compare(CHAT, **turn).last["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 10
    other = request(CHAT, picture(2, "blue"))
    usage = pair.compare(CHAT, **other).last["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] < 10
