"""Wraps either all seams of a patch table, or none."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import wrapt

from .._bootstrap import stand_aside
from .._errors import SpeculationError
from ._runpy import redirect_main
from ._table import Patch


class _Seam(wrapt.FunctionWrapper):
    """A wrapped function that copies and pickles like the one it wraps."""

    def __copy__(self) -> _Seam:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Seam:
        return self

    def __reduce_ex__(self, protocol: Any) -> str:
        return self.__wrapped__.__qualname__


class _Site(NamedTuple):
    """The place of a seam, with the original function and the wrapped one."""

    parent: Any
    name: str
    original: Any
    seam: _Seam


class Applier:
    """Applies one patch table to modules as they are imported.

    Attributes:
        enabled: Whether the wrappers run, also under names that were copied from the
          patched modules.
        problem: The reason why nothing is patched, None if there is none.
        warns: Whether to warn about a problem that an import brings up.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.problem: str | None = None
        self.warns = True
        self._table: tuple[Patch, ...] = ()
        self._sites: dict[Patch, _Site] = {}

    @property
    def applied(self) -> tuple[Patch, ...]:
        return tuple(row for row in self._table if row in self._sites)

    def apply(self, table: Iterable[Patch], refusal: str | None = None) -> None:
        """Patch the modules that are loaded now, and the others when they are.

        Args:
            table: The seams and their wrappers.
            refusal: The reason not to patch anything, if there is one.
        """
        if refusal is not None:
            self._stand_aside(refusal)
        if self._table or self.problem is not None:
            return
        self._table = tuple(table)
        names = dict.fromkeys(row.module for row in self._table)
        self._patch([name for name in names if name in sys.modules])
        redirect_main(names)
        for name in names:
            if name not in sys.modules:
                wrapt.register_post_import_hook(self._patch_module, name)

    def _patch_module(self, module: ModuleType) -> None:
        self._patch([module.__name__])

    def _patch(self, names: list[str]) -> None:
        if self.problem is not None:
            return
        # An exception here would make the import of a module fail.
        try:
            rows = [row for row in self._table if row.module in names]
            self._wrap({row: self._find(row) for row in rows if row not in self._sites})
        except SpeculationError as exc:
            self._stand_aside(str(exc))
        except Exception as exc:
            self._stand_aside(f"{type(exc).__name__}: {exc}")

    def _find(self, row: Patch) -> _Site:
        module = sys.modules[row.module]
        try:
            parent, name, original = wrapt.resolve_path(module, row.attribute)
        except AttributeError as exc:
            raise SpeculationError(f"it has no {row.seam}") from exc
        _check_parameters(row, getattr(parent, name))
        seam = _Seam(original, _load_wrapper(row.wrapper), self._is_enabled)
        return _Site(parent, name, original, seam)

    def _is_enabled(self) -> bool:
        return self.enabled and self.problem is None

    def _wrap(self, sites: dict[Patch, _Site]) -> None:
        self._sites.update(sites)
        for parent, name, _, seam in sites.values():
            setattr(parent, name, seam)
        self._rebind(
            {
                id(site.original): site.seam
                for row, site in sites.items()
                if getattr(site.original, "__module__", None) == row.module
            }
        )

    def _unwrap(self) -> None:
        for parent, name, original, seam in self._sites.values():
            # Somebody else may have wrapped the seam since: leave that alone.
            if vars(parent).get(name) is seam:
                setattr(parent, name, original)
        self._rebind({id(site.seam): site.original for site in self._sites.values()})
        self._sites.clear()

    def _rebind(self, replacements: dict[int, Any]) -> None:
        """Replace objects by identity in the modules of the patched packages."""
        for module in self._package_modules():
            for name, value in list(vars(module).items()):
                if id(value) in replacements:
                    setattr(module, name, replacements[id(value)])

    def _package_modules(self) -> Iterator[ModuleType]:
        packages = {row.module.partition(".")[0] for row in self._table}
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in packages and isinstance(module, ModuleType):
                yield module

    def _stand_aside(self, reason: str) -> None:
        if self.problem is not None:
            return
        self.problem = reason
        self._unwrap()
        if self.warns:
            stand_aside(reason)


def _check_parameters(row: Patch, seam: Callable[..., Any]) -> None:
    found = inspect.signature(seam).parameters
    missing = [name for name in row.parameters if name not in found]
    if missing:
        raise SpeculationError(
            f"{row.seam} has no parameter {', '.join(missing)} "
            f"(it has {', '.join(found)})"
        )


def _load_wrapper(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)
