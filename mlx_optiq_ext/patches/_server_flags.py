"""The command line of ``mlx_lm.server`` with our flags, and what its values may be."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

from .. import _interrupts
from .._options import API_KEY_VARIABLE, AUTO_AS_NUMBER
from .command_line import SpeculationParser, add_flags

RECOMMENDED_HELP = (
    "Sample as the model's generation_config.json recommends, penalties included, "
    "where neither a request nor --temp, --top-p, --top-k or --min-p says otherwise. "
    "--mtp and --draft imply it."
)
API_KEY_HELP = (
    "Key that requests must have, as a bearer token or as x-api-key. Other users of "
    f"this machine can read it here; {API_KEY_VARIABLE} of the environment, which is "
    "the default, keeps it from them"
)
REMOTE_IMAGES_HELP = (
    "Fetch images that requests name by http(s) URLs, from public addresses only. "
    "Without this flag images have to be data: URLs"
)
EXIT_STATUS = (
    f"Exit status: {_interrupts.STATUS} after Ctrl-C, 1 if the model cannot be loaded "
    "or the address cannot be listened at, 2 for wrong arguments."
)

# The fields of a request that these flags of mlx-lm are the defaults of.
SAMPLING_FLAGS = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
}

# mlx-lm takes any number for these flags, and then no request can be served.
LIMITS: dict[str, tuple[float, float]] = {
    "temp": (0, math.inf),
    "top_p": (0, 1),
    "top_k": (0, math.inf),
    "min_p": (0, 1),
    "max_tokens": (1, math.inf),
    "decode_concurrency": (1, math.inf),
    "prompt_concurrency": (1, math.inf),
    "prefill_step_size": (1, math.inf),
    "prompt_cache_size": (0, math.inf),
    "prompt_cache_bytes": (0, math.inf),
    "quantized_kv_start": (0, math.inf),
}
MAX_PORT = (1 << 16) - 1
# mlx has kernels for these numbers only.
CHOICES = {"kv_bits": (2, 3, 4, 5, 6, 8), "kv_group_size": (32, 64, 128)}


class ServerParser(SpeculationParser):
    """mlx-lm's parser with our flags at the end."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        add_serving_flags(self)
        add_flags(self)
        _name_malformed_sizes(self)
        defaults = {
            name: self.get_default(name)
            for name in (*SAMPLING_FLAGS, "prompt_cache_size")
        }
        # None tells a default from a value that was asked for.
        self.set_defaults(**dict.fromkeys(defaults))
        parsed = super().parse_args(args, namespace)
        _settle_prompt_cache_size(parsed, defaults["prompt_cache_size"])
        _settle_sampling(parsed, defaults)
        self._check_values(parsed)
        self._settle_drafter(parsed)
        parsed.is_command = True
        return parsed

    def _check_values(self, parsed: argparse.Namespace) -> None:
        """Refuse what would make every request fail, and its client be blamed."""
        # The system listens at such a port without its upper bits.
        self._check_range("port", parsed.port, 0, MAX_PORT)
        if not (parsed.recommended_sampling or parsed.prompt_lookup):
            return
        for name, (least, most) in LIMITS.items():
            self._check_range(name, getattr(parsed, name), least, most)
        for name, choices in CHOICES.items():
            self._check_choice(name, getattr(parsed, name), choices)
        if not isinstance(parsed.chat_template_args, dict):
            self._refuse("chat_template_args", "expected a JSON object")

    def _check_range(
        self, name: str, value: float | None, least: float, most: float
    ) -> None:
        if value is None or (least <= value <= most and math.isfinite(value)):
            return
        expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
        self._refuse(name, f"expected {expected}, got {value}")

    def _check_choice(self, name: str, value: Any, choices: tuple[int, ...]) -> None:
        if value is not None and value not in choices:
            expected = ", ".join(map(str, choices))
            self._refuse(name, f"expected one of {expected}, got {value}")

    def _refuse(self, name: str, reason: str) -> None:
        self.error(f"argument --{name.replace('_', '-')}: {reason}")

    def _settle_drafter(self, parsed: argparse.Namespace) -> None:
        """Leave a draft model to mlx-lm, and its default to mlx-lm's checks."""
        if parsed.draft is not None:
            from ..drafters import is_draft_model

            # Requests in a batch share no draft model: mlx-lm serves them one by one.
            if is_draft_model(parsed.draft):
                if parsed.prompt_lookup:
                    self.error(
                        "argument --prompt-lookup: not allowed with a draft model"
                    )
                if parsed.draft_vocab is not None:
                    self.error("argument --draft-vocab: needs --mtp")
                if parsed.mtp_bits is not None:
                    self.error("argument --mtp-bits: needs --mtp")
                parsed.draft_model, parsed.draft = parsed.draft, None
                if parsed.num_draft_tokens == "auto":
                    parsed.num_draft_tokens = self.num_draft_tokens
        if parsed.num_draft_tokens == "auto":
            # Requests that do not say are given this, and checked by mlx-lm.
            parsed.num_draft_tokens = AUTO_AS_NUMBER


def add_serving_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that a server has besides those for speculation.

    Args:
        parser (ArgumentParser): The parser of ``mlx_lm.server``.
    """
    add: Callable[..., Any] = parser.add_argument
    key = os.environ.get(API_KEY_VARIABLE)
    add("--api-key", type=_nonempty, default=key, help=API_KEY_HELP)
    add("--allow-remote-images", action="store_true", help=REMOTE_IMAGES_HELP)
    add(
        "--max-request-size",
        type=_size,
        default="32MB",
        help="Largest body of a request that is read (default: %(default)s)",
    )
    add("--recommended-sampling", action="store_true", help=RECOMMENDED_HELP)
    parser.epilog = EXIT_STATUS


def _name_malformed_sizes(parser: argparse.ArgumentParser) -> None:
    """Let a size that mlx-lm cannot read be a usage error instead of a traceback."""
    (option,) = (a for a in parser._actions if a.dest == "prompt_cache_bytes")
    read: Callable[[str], int] = option.type  # type: ignore[assignment]

    def read_or_refuse(text: str) -> int:
        try:
            return read(text)
        except (ArithmeticError, LookupError) as exc:
            message = f"expected a size like 4GB, got {text!r}"
            raise argparse.ArgumentTypeError(message) from exc

    option.type = read_or_refuse


def _settle_prompt_cache_size(parsed: argparse.Namespace, default: int) -> None:
    """Put mlx-lm's default back, and say whether the flag was given."""
    parsed.is_prompt_cache_size_given = parsed.prompt_cache_size is not None
    if not parsed.is_prompt_cache_size_given:
        parsed.prompt_cache_size = default


def _settle_sampling(parsed: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Put mlx-lm's defaults back, and say which flags were given."""
    given = {flag for flag in SAMPLING_FLAGS if getattr(parsed, flag) is not None}
    for flag in SAMPLING_FLAGS.keys() - given:
        setattr(parsed, flag, defaults[flag])
    parsed.given_sampling = {SAMPLING_FLAGS[flag] for flag in given}
    if parsed.mtp or parsed.draft is not None:
        parsed.recommended_sampling = True


def _nonempty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _size(text: str) -> int:
    number = text.upper().removesuffix("B")
    factor = {"K": 10, "M": 20, "G": 30}.get(number[-1:], 0)
    digits = number[:-1] if factor else number
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a size like 32MB, got {text!r}")
    return int(digits) << factor
