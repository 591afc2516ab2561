"""Loads an assistant from its checkpoint."""

from __future__ import annotations

from mlx_lm.utils import load_model

from .._checkpoints import Source, find_folder, read_config, read_json
from .._errors import SpeculationError
from .._random_state import random_state_kept
from ._model import Assistant, AssistantArgs

MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")

# The classes of the layers raise these if the configuration lacks something or has
# values that do not fit together.
_MISFIT = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_assistant(source: Source) -> Assistant:
    """Load the assistant of a Gemma-4 model.

    Args:
        source (str or Path): A folder or a Hub id.

    Raises:
        SpeculationError: If there is no assistant, or a part of it is missing.
    """
    if (found := read_config(source).get("model_type")) not in MODEL_TYPES:
        raise SpeculationError(
            f"Cannot speculate: {source} is of type {found}, expected a Gemma-4 "
            f"assistant of type {' or '.join(MODEL_TYPES)}."
        )
    folder = find_folder(source)
    generation = read_json(folder / "generation_config.json")
    suppressed = generation.get("suppress_tokens") or ()
    try:
        with random_state_kept():
            model, _ = load_model(
                folder,
                model_config={"suppress_tokens": suppressed},
                get_model_classes=lambda config: (Assistant, AssistantArgs),
            )
    except _MISFIT as exc:
        raise SpeculationError(
            f"Cannot speculate: the assistant in {folder} cannot be loaded: {exc}"
        ) from exc
    return model
