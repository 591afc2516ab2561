"""Reads what a request says that its reply has to look like, in the words of all APIs.

What is read here is compiled in the thread of the request, so that a grammar that takes
long to compile keeps nobody else waiting.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from ..grammars import ANY_OBJECT, GrammarError, Source
from ._conversation import to_json
from ._errors import APIError, bad_request
from ._fields import checked, choice, number, optional, required
from ._request import Request

Body = dict[str, Any]

FORMATS = ("text", "json_object", "json_schema")
# vLLM's fields, by which servers of many kinds are asked.
GUIDED = ("json", "regex", "grammar", "choice")
BUDGETS = ("max_thinking_tokens", "thinking_budget", "thinking_token_budget")


def read_structure(body: Body, request: Request) -> None:
    """Read the fields that all APIs have: vLLM's for grammars, and budgets.

    Raises:
        APIError: 400, with the first that is at fault.
    """
    fields = {f"guided_{name}": body.get(f"guided_{name}") for name in GUIDED}
    options = optional(body, "structured_outputs", dict, {})
    fields |= {f"structured_outputs.{name}": options.get(name) for name in GUIDED}
    for path, content in fields.items():
        if content is not None:
            _set_guided(request, path, content)
    for name in BUDGETS:
        if (budget := number(body, name, None, least=0, kind=int)) is not None:
            request.max_thinking_tokens = budget


def read_format(layout: Any, path: str, request: Request) -> None:
    """Read the format that a reply is to have.

    Args:
        layout (dict, optional): ``{"type": ...}``, as all vendors have it; a schema is
            beside the type, or in an object of the name "json_schema".
        path (str): Where it is.
        request (Request): The answer's grammar is left with it.

    Raises:
        APIError: 400, if it is malformed.
    """
    if layout is None:
        return
    if not isinstance(layout, dict):
        raise bad_request(f"{path}: expected an object", param=path)
    kind = choice(required(layout, "type", str, f"{path}."), FORMATS, f"{path}.type")
    if kind == "json_object":
        set_answer(request, ANY_OBJECT, path)
    if kind != "json_schema":
        return
    path = f"{path}."
    is_nested = "json_schema" in layout or path == "response_format."
    if is_nested and "schema" not in layout:
        layout, path = (
            required(layout, "json_schema", dict, path),
            f"{path}json_schema.",
        )
    schema = required(layout, "schema", dict, path)
    is_strict = optional(layout, "strict", bool, False, path)
    set_answer(request, Source("json_schema", schema, is_strict), f"{path}schema")


def set_answer(request: Request, source: Source, path: str) -> None:
    """Have the answer follow a grammar.

    Raises:
        APIError: 400, if there is one already.
    """
    if request.answer is not None:
        raise bad_request(
            f"{path}: not allowed with {request.answer_path}, expected one of them",
            param=path,
        )
    if request.prefill:
        raise bad_request(
            f"{path}: not allowed where the last message is the assistant's",
            param=path,
        )
    request.answer, request.answer_path = source, path
    # The white space between a thought and the answer is none of the answer.
    request.keeps_space = request.keeps_space and request.request_type == "text"


def _set_guided(request: Request, path: str, content: Any) -> None:
    name = path.rpartition(".")[2].removeprefix("guided_")
    if name == "regex":
        source = Source("regex", checked(content, str, path))
    elif name == "grammar":
        source = Source("grammar", checked(content, str, path))
    elif name == "choice":
        source = Source("grammar", _alternatives(content, path))
    else:
        source = Source("json_schema", _parsed(content, path))
    set_answer(request, source, path)


def _alternatives(content: Any, path: str) -> str:
    """The grammar of one of some texts."""
    texts = checked(content, list, path)
    for index, text in enumerate(texts):
        checked(text, str, f"{path}.{index}")
    if not texts:
        raise bad_request(f"{path}: at least one is required", param=path)
    return f"start: {' | '.join(map(to_json, texts))}"


def _parsed(content: Any, path: str) -> Any:
    """A JSON schema, which some clients send as a text."""
    if not isinstance(content, str):
        return checked(content, dict, path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"{path}: no JSON: {error}", param=path) from error


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Say of what is wrong with a grammar where in the request it is.

    Raises:
        APIError: 400.
    """
    try:
        yield
    except GrammarError as error:
        place = ".".join(filter(None, [path, error.path]))
        raise bad_request(f"{place}: {error.reason}", param=path or None) from error
    except ImportError as error:
        if error.name != "llguidance":
            raise
        raise APIError(
            400, f"{path}: {error}", param=path, code="unsupported_parameter"
        ) from error
