"""Speculative decoding for mlx-lm with the drafters that models bring along.

Once the package is installed, mlx-lm is patched in every interpreter that imports it.
Some interpreters do not run start-up files (`python -S`, `pip install --target`,
PYTHONPATH); there, importing this package before or after mlx-lm patches it as well.
Only names that another module has copied out of mlx-lm by then, as with
`from mlx_lm import generate`, remain unpatched.
"""

from . import _bootstrap

# Every interpreter imports this module, so it does not even import `typing`.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._errors import GrammarError, SpeculationError
    from .decoding import (
        SequenceOptions,
        SpeculationStats,
        SpeculativeBatchGenerator,
        spec_generate_step,
    )
    from .drafters import GemmaAssistantDrafter
    from .patches import disable, enable, is_enabled

__version__ = "0.1.0"

__all__ = [
    "GemmaAssistantDrafter",
    "GrammarError",
    "SequenceOptions",
    "SpeculationError",
    "SpeculationStats",
    "SpeculativeBatchGenerator",
    "__version__",
    "disable",
    "enable",
    "is_enabled",
    "spec_generate_step",
]

_HOMES = {
    "GemmaAssistantDrafter": ".drafters",
    "SequenceOptions": ".decoding",
    "GrammarError": "._errors",
    "SpeculationError": "._errors",
    "SpeculationStats": ".decoding",
    "SpeculativeBatchGenerator": ".decoding",
    "disable": ".patches",
    "enable": ".patches",
    "is_enabled": ".patches",
    "spec_generate_step": ".decoding",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_bootstrap.install()
