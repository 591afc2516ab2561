"""The APIs of OpenAI and Anthropic in front of mlx-lm's own generation."""

from ._cached_tokens import with_cached_tokens
from ._constraints import constraints
from ._errors import LOADING
from ._exchange import IDLE_TIMEOUT, printable
from ._malformed import send_malformed
from ._prompt import Segments, make_prompt
from ._prompt_cache import PromptCache
from ._recovery import admit, guard_sequences, run_again
from ._routes import serve
from ._sampling import describe_recommended
from ._speculation import (
    options_of,
    serve_speculatively,
    speculation_of,
)
from ._state import ServerState

__all__ = [
    "IDLE_TIMEOUT",
    "LOADING",
    "PromptCache",
    "Segments",
    "ServerState",
    "admit",
    "constraints",
    "describe_recommended",
    "guard_sequences",
    "make_prompt",
    "options_of",
    "printable",
    "run_again",
    "send_malformed",
    "serve",
    "serve_speculatively",
    "speculation_of",
    "with_cached_tokens",
]
