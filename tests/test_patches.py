"""The patch applier, on a small package that is laid out like mlx-lm."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import sys
import warnings
from collections.abc import Callable
from functools import partial
from itertools import count
from types import ModuleType

import pytest

from mlx_optiq_ext.patches import _table
from mlx_optiq_ext.patches._applier import Applier
from mlx_optiq_ext.patches._table import Patch
from mlx_optiq_ext.patches._versions import unsupported_reason

LISTED = "supported are 0.32.0, 0.32.1 and 0.32.2"
CORE = """
def shout(text, *, mark="!"):
    "Say it loud."
    return text.upper() + mark

def spell(text):
    yield from text

class Speaker:
    def say(self, text):
        return text
    @staticmethod
    def cough(text):
        return text
    @classmethod
    def name(cls, text):
        return cls.__name__ + text
"""
LATE = "from .core import shout\n\ndef whisper(text):\n    return text.lower()\n"

_numbers = count()


def doubled(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs) * 2


def listed(wrapped, instance, args, kwargs):
    return list(wrapped(*args, **kwargs))


def marked(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs) + f"<{type(instance).__name__}>"


@pytest.fixture
def toy(tmp_path, monkeypatch) -> str:
    """The name of a package whose `__init__` copies a name from its `core`."""
    name = f"toy{next(_numbers)}"
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("from .core import shout, spell\n")
    (package / "core.py").write_text(CORE)
    (package / "late.py").write_text(LATE)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def patch(
    toy: str,
    attribute: str,
    wrapper: str = "doubled",
    parameters: tuple[str, ...] = (),
    module: str = "core",
) -> Patch:
    return Patch(f"{toy}.{module}", attribute, f"{__name__}:{wrapper}", parameters)


def warnings_of(action: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught]


def load(toy: str, module: str | None = None) -> ModuleType:
    return importlib.import_module(f"{toy}.{module}" if module else toy)


def test_a_module_is_patched_when_it_is_imported(toy):
    Applier().apply([patch(toy, "shout", parameters=("text", "mark"))])
    assert f"{toy}.core" not in sys.modules
    assert load(toy).shout("a") == "A!A!"
    assert load(toy, "late").shout("a") == "A!A!"


def test_a_loaded_module_is_patched_with_the_copies_in_its_package(toy):
    package, late = load(toy), load(toy, "late")
    Applier().apply([patch(toy, "shout")])
    assert load(toy, "core").shout("a") == "A!A!"
    assert package.shout("a") == "A!A!"
    assert late.shout("a") == "A!A!"


def test_a_seam_that_a_module_imports_is_patched_in_that_module_only(toy):
    package, late = load(toy), load(toy, "late")
    Applier().apply([patch(toy, "shout", module="late")])
    assert late.shout("a") == "A!A!"
    assert package.shout("a") == "A!"
    assert load(toy, "core").shout("a") == "A!"


def test_names_copied_elsewhere_before_are_out_of_reach(toy):
    shout = load(toy).shout
    Applier().apply([patch(toy, "shout")])
    assert shout("a") == "A!"


def test_names_copied_while_patched_obey_the_switch(toy):
    applier = Applier()
    applier.apply([patch(toy, "shout")])
    shout = load(toy).shout
    results = []
    for enabled in (True, False, True):
        applier.enabled = enabled
        results.append(shout("a"))
    assert results == ["A!A!", "A!", "A!A!"]


def test_applying_twice_wraps_once(toy):
    applier = Applier()
    load(toy)
    for _ in range(2):
        applier.apply([patch(toy, "shout"), patch(toy, "whisper", module="late")])
    assert load(toy).shout("a") == "A!A!"
    assert load(toy, "late").whisper("A") == "aa"


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("say", "a<Speaker>"),
        ("cough", "a<NoneType>"),
        ("name", "Speakera<type>"),
    ],
)
def test_methods_are_wrapped_with_their_instance(toy, attribute, expected):
    Applier().apply([patch(toy, f"Speaker.{attribute}", "marked", ("text",))])
    assert getattr(load(toy, "core").Speaker(), attribute)("a") == expected


def test_a_seam_looks_like_the_function_it_wraps(toy):
    original = inspect.signature(load(toy, "core").shout)
    Applier().apply([patch(toy, "shout"), patch(toy, "spell", "listed")])
    core = load(toy, "core")
    assert inspect.signature(core.shout) == original
    assert core.shout.__doc__ == "Say it loud."
    assert (core.shout.__module__, core.shout.__qualname__) == (f"{toy}.core", "shout")
    assert inspect.isgeneratorfunction(core.spell)


def test_a_seam_pickles_and_copies_like_the_function_it_wraps(toy):
    Applier().apply([patch(toy, "shout")])
    shout = load(toy).shout
    assert pickle.loads(pickle.dumps(shout)) is shout
    assert copy.copy(shout) is shout
    assert copy.deepcopy([shout])[0] is shout


def test_wrappers_are_imported_with_the_module_they_are_for(toy, tmp_path):
    (tmp_path / "wrappers.py").write_text(
        "def silent(wrapped, instance, args, kwargs):\n    return ''\n"
    )
    Applier().apply([Patch(f"{toy}.late", "whisper", "wrappers:silent")])
    load(toy)
    assert "wrappers" not in sys.modules
    assert load(toy, "late").whisper("a") == ""
    assert sys.modules.pop("wrappers")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"attribute": "yell"}, "it has no TOY.core.yell"),
        ({"attribute": "Speaker.yell"}, "it has no TOY.core.Speaker.yell"),
        (
            {"attribute": "shout", "parameters": ("text", "pitch", "speed")},
            "TOY.core.shout has no parameter pitch, speed (it has text, mark)",
        ),
        (
            {"attribute": "spell", "wrapper": "missing"},
            f"AttributeError: module '{__name__}' has no attribute 'missing'",
        ),
    ],
)
@pytest.mark.parametrize("loaded_first", [False, True])
def test_a_row_that_does_not_fit_leaves_all_as_it_was(toy, row, reason, loaded_first):
    applier = Applier()
    if loaded_first:
        load(toy)
    rows = [patch(toy, "shout"), patch(toy, **row)]
    caught = warnings_of(lambda: (applier.apply(rows), load(toy), load(toy, "late")))
    reason = reason.replace("TOY", toy)
    assert caught == [f"mlx-optiq-ext leaves mlx-lm as it is: {reason}"]
    assert applier.problem == reason
    assert not applier.applied
    assert inspect.isfunction(load(toy).shout)
    assert type(load(toy, "core").shout) is type(lambda: None)
    assert type(load(toy, "late").shout) is type(lambda: None)


def test_a_row_that_does_not_fit_later_undoes_the_earlier_ones(toy):
    applier = Applier()
    applier.apply([patch(toy, "shout"), patch(toy, "yell", module="late")])
    package, copied = load(toy), load(toy).shout
    assert copied("a") == "A!A!"
    with pytest.warns(RuntimeWarning, match="late.yell"):
        load(toy, "late")
    assert type(package.shout) is type(lambda: None)
    assert copied("a") == "A!"


def test_what_others_wrapped_around_a_seam_stays(toy):
    applier = Applier()
    applier.apply([patch(toy, "shout"), patch(toy, "yell", module="late")])
    core = load(toy, "core")
    ours = core.shout
    theirs = core.shout = lambda text: "<" + ours(text) + ">"
    with pytest.warns(RuntimeWarning):
        load(toy, "late")
    assert core.shout is theirs
    assert core.shout("a") == "<A!>"


def test_no_import_fails_when_warnings_are_errors(toy, caplog):
    applier = Applier()
    applier.apply([patch(toy, "yell")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(toy).shout("a") == "A!"
    assert f"it has no {toy}.core.yell" in caplog.text


def test_a_refusal_patches_nothing_and_warns_once(toy):
    applier = Applier()
    load(toy)
    apply = partial(applier.apply, [patch(toy, "shout")], "wrong release")
    caught = warnings_of(lambda: (apply(), apply()))
    assert caught == ["mlx-optiq-ext leaves mlx-lm as it is: wrong release"]
    assert load(toy).shout("a") == "A!"


def test_the_installed_mlx_lm_is_supported():
    assert unsupported_reason() is None


@pytest.mark.parametrize(
    ("found", "supported"),
    [
        ("0.31.3", False),
        ("0.32.0", True),
        ("0.32.2", True),
        ("0.32.2.post1", False),
        ("0.32.3.dev1", False),
        ("0.32.3", False),
        ("0.33.0", False),
        ("0.33.0rc1", False),
    ],
)
def test_only_versions_that_were_tested_are_supported(
    found, supported, tmp_path, monkeypatch
):
    folder = tmp_path / f"mlx_lm-{found}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Name: mlx-lm\nVersion: {found}\n")
    monkeypatch.syspath_prepend(tmp_path)
    reason = None if supported else f"mlx-lm {found} is installed, {LISTED}"
    assert unsupported_reason() == reason


def test_each_seam_of_the_table_is_wrapped_once():
    seams = [row.seam for row in _table.PATCHES]
    assert len(seams) == len(set(seams))


def test_each_seam_of_the_table_can_be_wrapped():
    applier = Applier()
    for row in _table.PATCHES:
        importlib.import_module(row.module)
        assert applier._find(row).seam.__wrapped__ is not None
