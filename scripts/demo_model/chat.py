"""Conversations made from the corpus: a request for a function, and its code."""

from __future__ import annotations

import ast
import random
import re
import textwrap
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .corpus import Document

Message = dict[str, str]

_MIN_CODE, _MAX_CODE = 50, 900
_MAX_SUMMARY = 100
_SYSTEM_SHARE = 0.15
_SECOND_TURN_SHARE = 0.1
_BARE_ANSWER_SHARE = 0.25
# A method's body is about an object that the request does not show.
_METHOD_SHARE = 0.5
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a Python programmer. Answer with code only.",
    "Write Python code.",
    "You write short, correct Python functions.",
    "You are a coding assistant.",
)
# The first are taken more often.
_REQUESTS = (
    "Write a function that {does}.",
    "Write a {kind} that {does}.",
    "Write a Python {kind} that {does}.",
    "Write a {kind} `{name}` that {does}.",
    "Write a {kind} called {name} that {does}.",
    "Write a Python {kind} {name} that {does}",
    "Write the Python {kind} `{signature}`. {summary}.",
    "Implement `{name}`: {summary}.",
    "Please write a {kind} that {does}.",
    "How do I write a {kind} that {does}?",
    "I need a {kind} that {does}.",
    "{signature}:",
    "{summary}.",
)
_REQUEST_WEIGHTS = (6, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1)
# What docstrings begin with: an order, or its third person.
_VERBS = frozenset(Path(__file__).with_name("verbs.txt").read_text().split())
_ES_ENDINGS = ("s", "sh", "ch", "x", "z")
_VOWELS = "aeiou"


@dataclass(frozen=True)
class Function:
    """A function of the corpus: what is asked for it by, and its code."""

    name: str
    signature: str
    summary: str
    does: str
    kind: str
    code: str
    bare_code: str


def make_conversations(documents: list[Document], *, seed: int) -> list[list[Message]]:
    """Make conversations from the functions of some files, each code once.

    Args:
        documents (list): The files.
        seed (int): Of the order, the number of turns and the wordings.
    """
    choose = random.Random(seed)
    unique = {function.bare_code: function for function in _all_functions(documents)}
    functions = [
        function
        for function in unique.values()
        if function.kind == "function" or choose.random() < _METHOD_SHARE
    ]
    choose.shuffle(functions)
    conversations: list[list[Message]] = []
    while functions:
        num_turns = 2 if choose.random() < _SECOND_TURN_SHARE else 1
        turns = [functions.pop() for _ in range(min(num_turns, len(functions)))]
        conversations.append(_converse(turns, choose))
    return conversations


def third_person(summary: str) -> str | None:
    """Turn the first line of a docstring into what a function does.

    Args:
        summary (str): "Return the sum." or "Returns the sum."

    Returns:
        str: "returns the sum", or None if the line does not begin with a known verb.
    """
    verb, _, rest = summary.rstrip(". ").partition(" ")
    verb = verb.lower()
    if not rest or not verb:
        return None
    if verb in _VERBS:
        return f"{_conjugate(verb)} {rest}"
    is_third_person = any(_conjugate(known) == verb for known in _stems(verb))
    return f"{verb} {rest}" if is_third_person else None


def _conjugate(verb: str) -> str:
    if verb.endswith("y") and verb[-2] not in _VOWELS:
        return f"{verb[:-1]}ies"
    return f"{verb}es" if verb.endswith(_ES_ENDINGS) else f"{verb}s"


def _stems(verb: str) -> Iterator[str]:
    for stem in (verb[:-1], verb[:-2], f"{verb[:-3]}y"):
        if stem in _VERBS:
            yield stem


def _converse(functions: list[Function], choose: random.Random) -> list[Message]:
    messages: list[Message] = []
    if choose.random() < _SYSTEM_SHARE:
        content = choose.choice(_SYSTEM_PROMPTS)
        messages.append({"role": "system", "content": content})
    for function in functions:
        (template,) = choose.choices(_REQUESTS, _REQUEST_WEIGHTS)
        request = template.format(**vars(function))
        bare = choose.random() < _BARE_ANSWER_SHARE
        answer = function.bare_code if bare else function.code
        messages.append({"role": "user", "content": request})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _all_functions(documents: list[Document]) -> Iterator[Function]:
    texts = [document.text for document in documents]
    with ProcessPoolExecutor() as pool:
        for functions in pool.map(_functions, texts, chunksize=64):
            yield from functions


def _functions(text: str) -> list[Function]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    lines = text.split("\n")
    nodes = _function_nodes(tree.body)
    found = (_function(node, lines) for node in nodes)
    return [function for function in found if function is not None]


def _function_nodes(body: Iterable[ast.stmt]) -> Iterator[ast.FunctionDef]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _function_nodes(node.body)
        elif isinstance(node, ast.FunctionDef):
            yield node


def _function(node: ast.FunctionDef, lines: list[str]) -> Function | None:
    docstring = ast.get_docstring(node)
    body = node.body if docstring is None else node.body[1:]
    summary = _summary(docstring) if docstring else node.name.replace("_", " ")
    does = third_person(summary)
    if does is None or not body or not _has_lines_of_its_own(node):
        return None
    head = lines[node.lineno - 1 : node.body[0].lineno - 1]
    rest = lines[body[0].lineno - 1 : node.end_lineno]
    quoted = [f'{" " * node.body[0].col_offset}"""{summary}."""'] if docstring else []
    code, bare_code = (
        textwrap.dedent("\n".join([*head, *each, *rest])) for each in (quoted, [])
    )
    is_whole = code.startswith("def ") and code.isascii() and "__" not in node.name
    if not is_whole or not _MIN_CODE < len(bare_code) < _MAX_CODE:
        return None
    arguments = node.args.args
    is_method = bool(arguments) and arguments[0].arg in ("self", "cls")
    if is_method and docstring is None:
        return None
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return Function(
        name=node.name,
        signature=f"def {node.name}({ast.unparse(node.args)}){returns}",
        summary=summary,
        does=does,
        kind="method" if is_method else "function",
        code=code,
        bare_code=bare_code,
    )


def _has_lines_of_its_own(node: ast.FunctionDef) -> bool:
    """Whether the signature, the docstring and the rest begin on lines of their own."""
    first, *others = node.body
    follows = not others or others[0].lineno > (first.end_lineno or 0)
    return first.lineno > node.lineno and follows


def _summary(docstring: str) -> str:
    """Return the first sentence, without its full stop and without markup."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"\.(?:\s|$)|:$", paragraph)[0]
    sentence = re.sub(r":\w+:`~?([^`]*)`", r"\1", sentence).replace("``", "`")
    is_short = 12 <= len(sentence) <= _MAX_SUMMARY and '"' not in sentence
    return sentence if is_short and "\\" not in sentence else ""
