"""Conversations made from the corpus: a request for a function, and its code."""

from __future__ import annotations

import ast
import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from .corpus import Document

Message = dict[str, str]

_MIN_CODE, _MAX_CODE = 60, 1000
_SYSTEM_SHARE = 0.25
_SECOND_TURN_SHARE = 0.1
_BARE_ANSWER_SHARE = 0.4
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a Python programmer. Answer with code only.",
    "Write Python code.",
    "You write short, correct Python functions.",
    "You are a coding assistant.",
)
_REQUESTS = (
    "Write the Python function `{signature}`. {summary}",
    "Write a Python function `{name}`. {summary}",
    "{signature}:",
    "{signature}:",
    "Complete this function:\n\n{signature}:\n    # {summary}",
    "Implement `{name}` in Python. {summary}",
    "How do I write `{signature}` in Python?",
    "I need a function called {name}. {summary}",
)


@dataclass(frozen=True)
class Function:
    """A function of the corpus: its signature, its docstring's first line, its code."""

    name: str
    signature: str
    summary: str
    code: str
    bare_code: str


def make_conversations(
    documents: list[Document], *, share: float, seed: int
) -> list[list[Message]]:
    """Make conversations from the functions of some files.

    Args:
        documents (list): The files.
        share (float): The part of the functions that is used, 0 to 1.
        seed (int): Of the choice of functions and wordings.
    """
    choose = random.Random(seed)
    functions = [
        function
        for document in documents
        for function in _functions(document.text)
        if choose.random() < share
    ]
    choose.shuffle(functions)
    conversations: list[list[Message]] = []
    while functions:
        num_turns = 2 if choose.random() < _SECOND_TURN_SHARE else 1
        turns = [functions.pop() for _ in range(min(num_turns, len(functions)))]
        conversations.append(_converse(turns, choose))
    return conversations


def _converse(functions: list[Function], choose: random.Random) -> list[Message]:
    messages: list[Message] = []
    if choose.random() < _SYSTEM_SHARE:
        content = choose.choice(_SYSTEM_PROMPTS)
        messages.append({"role": "system", "content": content})
    for function in functions:
        request = choose.choice(_REQUESTS).format(**vars(function)).strip()
        bare = choose.random() < _BARE_ANSWER_SHARE
        answer = function.bare_code if bare else function.code
        messages.append({"role": "user", "content": request})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _functions(text: str) -> Iterator[Function]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = _function(node, lines)
            if function is not None:
                yield function


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> Function | None:
    code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    if node.name.startswith("__") or not code.startswith(("def ", "async def ")):
        return None
    if not _MIN_CODE < len(code) < _MAX_CODE:
        return None
    summary = (ast.get_docstring(node) or "").split("\n")[0].strip()
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return Function(
        name=node.name,
        signature=f"{keyword} {node.name}({ast.unparse(node.args)}){returns}",
        summary=summary,
        code=code,
        bare_code=_without_docstring(node, lines) if summary else code,
    )


def _without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> str:
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    kept = lines[node.lineno - 1 : docstring.lineno - 1]
    rest = lines[docstring.end_lineno : node.end_lineno]
    if not "".join(rest).strip():
        rest = [" " * docstring.col_offset + "pass"]
    while not rest[0].strip():
        rest.pop(0)
    return textwrap.dedent("\n".join([*kept, *rest]))
