"""Makes `python -m mlx_lm.generate` run the module that is patched.

runpy executes a second copy of the module under the name `__main__`, which no import
hook sees. This module replaces that copy by the `if __name__ == "__main__"` block
alone, and runs the block inside the imported module.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Container, Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

import wrapt

from .._bootstrap import module_run_as_main

MAIN_TEST = "__name__ == '__main__'"


def run_main_block(name: str) -> None:
    """Run the `if __name__ == "__main__"` block of a module within the module."""
    module = importlib.import_module(name)
    path = module.__file__ or name
    exec(compile(_main_block(_source(module)), path, "exec"), vars(module))


def redirect_main(names: Container[str]) -> None:
    """Let `python -m NAME` run the imported module if NAME is among the names."""
    name = module_run_as_main()
    if name is not None and name in names:
        sys.meta_path.insert(0, _MainFinder(name))


def _source(module: ModuleType) -> str:
    return module.__loader__.get_source(module.__name__)  # type: ignore[union-attr]


def _main_block(source: str) -> ast.Module:
    tree = ast.parse(source)
    tree.body = [
        statement
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == MAIN_TEST
        for statement in node.body
    ]
    return tree


class _MainLoader(wrapt.ObjectProxy):
    """The loader of a module, except that runpy gets only the main block from it."""

    def get_code(self, name: str) -> CodeType:
        if self.__wrapped__.get_source(name) is None:
            return self.__wrapped__.get_code(name)
        call = f"from {__name__} import run_main_block; run_main_block({name!r})"
        return compile(call, self.__wrapped__.get_filename(name), "exec")


class _MainFinder:
    """A meta path entry that gives one module a _MainLoader."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        if name != self._name or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _MainLoader(spec.loader)
        return spec
