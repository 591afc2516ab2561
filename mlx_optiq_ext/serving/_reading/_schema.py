"""What the declarations of tools say about the values of arguments."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator
from typing import Any

from .._conversation import to_json

Schema = dict[str, Any]


class Declarations:
    """The arguments of a request's tools.

    Args:
        tools (list[dict], optional): The tools, in the form that chat templates take.
    """

    def __init__(self, tools: list[dict[str, Any]] | None):
        self.given = tools
        functions = [_as_dict(tool.get("function")) for tool in tools or []]
        self._parameters = {
            str(function.get("name")): _as_dict(function.get("parameters"))
            for function in functions
        }

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def are_in(self, text: str) -> bool:
        """Whether a text names one of the tools."""
        return any(name in text for name in self._parameters)

    def of(self, name: str) -> Declared:
        schema = self._parameters.get(name, {})
        return Declared(schema, schema)


class Declared:
    """What is declared of one value.

    Args:
        schema (dict): Its own schema, {} if it has none.
        root (dict): The schema whose definitions references mean.
    """

    def __init__(self, schema: Schema, root: Schema):
        self._schema = schema
        self._root = root
        self._alternatives = list(_alternatives(schema, root, depth=8))
        self.types = {
            kind for each in self._alternatives for kind in _types_of(each) if kind
        }

    @property
    def is_text(self) -> bool:
        """Whether the value is a string, or null, whatever is written."""
        return not self.types - {"string", "null"} and not self._may_be_json

    @property
    def may_be_null(self) -> bool:
        return "null" in self.types or not self.types

    @property
    def nulls(self) -> tuple[str, ...]:
        """How no value is written: chat templates show models Python's word."""
        return ("null", "none") if self.types else ("null",)

    @property
    def names(self) -> set[str]:
        """The keys that are declared of an object."""
        return {key for each in self._alternatives for key in _properties(each)}

    def member(self, key: str) -> Declared:
        """What is declared of a member of an object."""
        for each in self._alternatives:
            if key in (properties := _properties(each)):
                return Declared(_as_dict(properties[key]), self._root)
        return Declared({}, self._root)

    def item(self) -> Declared:
        """What is declared of the items of an array."""
        items = [_as_dict(each.get("items")) for each in self._alternatives]
        return Declared(next(filter(None, items), {}), self._root)

    def read(self, text: str) -> Any:
        """The value that a text without quotes stands for.

        A text that is none of the declared types is the string that it is: who
        called for it can tell the model so.
        """
        if self.may_be_null and text.lower() in self.nulls:
            return None
        if "string" in self.types or not self.types:
            return self._read_json(text)
        for kind in (kind for kind in READERS if kind in self.types):
            try:
                return READERS[kind](text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
        return text

    def _read_json(self, text: str) -> Any:
        """The value of a text that may as well be a string."""
        kinds = {"object", "array"} if self._may_be_json else self.types - {"string"}
        if not kinds:
            return text
        try:
            value = load_json(text)
        except (ValueError, RecursionError):
            return text
        kind = _type_of_value(value)
        is_number = kind == "integer" and "number" in kinds
        return value if kind in kinds or is_number else text

    @property
    def _may_be_json(self) -> bool:
        # mlx-lm reads a container where there is a schema and it names no type.
        return bool(self._schema) and not self.types


def read_bare(text: str) -> Any:
    """The JSON that a text is, itself if it is none."""
    try:
        return load_json(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def load_json(text: str) -> Any:
    """Read JSON whose strings may have line breaks; a number has to be finite."""
    return json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is no JSON")
    return number


def _read_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not number.is_integer():
        raise ValueError(f"{text!r} is no integer")
    return int(number)


def _read_number(text: str) -> int | float:
    try:
        return _read_integer(text)
    except (ValueError, OverflowError):
        return _finite(text)


def _read_boolean(text: str) -> bool:
    return {"true": True, "false": False}[_known(text.strip().lower())]


def _known(word: str) -> str:
    if word not in ("true", "false"):
        raise ValueError(f"{word!r} is no boolean")
    return word


def _read_container(kind: type, text: str) -> Any:
    try:
        value = load_json(text)
    except ValueError:
        # Templates show models Python's notation.
        value = json.loads(to_json(_literal(text)))
    if not isinstance(value, kind):
        raise ValueError(f"{text!r} is no {kind.__name__}")
    return value


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
        json.dumps(value, allow_nan=False)
    except TypeError as exc:
        raise ValueError(f"{text!r} is no JSON") from exc
    return value


# In the order in which they are tried; whatever a text is, it is a string.
READERS = {
    "integer": _read_integer,
    "number": _read_number,
    "boolean": _read_boolean,
    "object": lambda text: _read_container(dict, text),
    "array": lambda text: _read_container(list, text),
}


def _alternatives(schema: Schema, root: Schema, depth: int) -> Iterator[Schema]:
    """A schema and those that it is made of, references followed."""
    if depth == 0:
        return
    yield schema
    parts = [
        part
        for key in ("anyOf", "oneOf", "allOf")
        if isinstance(schema.get(key), list)
        for part in schema[key]
    ]
    if isinstance(reference := schema.get("$ref"), str):
        parts.append(_resolve(reference, root))
    for part in parts:
        yield from _alternatives(_as_dict(part), root, depth - 1)


def _resolve(reference: str, root: Schema) -> Schema:
    found: Any = root
    for name in reference.removeprefix("#/").split("/"):
        found = _as_dict(found).get(name)
    return _as_dict(found)


ALIASES = {
    **dict.fromkeys(("str", "text", "varchar", "char", "enum"), "string"),
    **dict.fromkeys(("bool", "binary"), "boolean"),
    **dict.fromkeys(("arr", "list"), "array"),
    **dict.fromkeys(("dict", "map"), "object"),
}
# mlx-lm takes what starts like these for them: int64, unsigned, float32, ...
PREFIXES = {
    **dict.fromkeys(("int", "uint", "long", "short", "unsigned"), "integer"),
    **dict.fromkeys(("num", "float", "double"), "number"),
    **dict.fromkeys(("dict",), "object"),
    **dict.fromkeys(("list",), "array"),
}


def _types_of(schema: Schema) -> Iterator[str | None]:
    declared = schema.get("type")
    if declared is not None:
        yield from map(_kind, declared if isinstance(declared, list) else [declared])
    else:
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        yield from map(_type_of_value, values if isinstance(values, list) else [])
        yield "object" if _properties(schema) else None


def _kind(name: Any) -> str:
    word = str(name).strip().lower()
    prefixed = (kind for prefix, kind in PREFIXES.items() if word.startswith(prefix))
    return ALIASES.get(word) or next(prefixed, word)


def _type_of_value(value: Any) -> str:
    kinds: dict[type, str] = {
        str: "string",
        bool: "boolean",
        int: "integer",
        float: "number",
        dict: "object",
        list: "array",
    }
    return kinds.get(type(value), "null")


def _properties(schema: Schema) -> Schema:
    return _as_dict(schema.get("properties"))


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
