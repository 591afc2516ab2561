"""Wrappers for the command lines of mlx-lm: their parsers and their ``main``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .._errors import SpeculationError
from .._options import check_num_draft_tokens
from ._request import CommandLineRequest, command_line

MTP_HELP = (
    "Speculate with the multi-token-prediction head of a Qwen3.5 or Qwen3.6 model. "
    "PATH names a separate head; by default it is looked for beside the model."
)
NUM_DRAFT_TOKENS_HELP = (
    "Number of tokens to draft when using speculative decoding (default with --mtp: 1)."
)


class SpeculationParser(argparse.ArgumentParser):
    """Checks the flags for speculation and remembers what they ask for."""

    num_draft_tokens: int | None = None  # upstream's default

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed = super().parse_args(args, namespace)
        if parsed.mtp:
            self._check(parsed)
        if (request := command_line.get()) is not None:
            request.mtp = parsed.mtp
            request.num_draft_tokens = parsed.num_draft_tokens
        if parsed.num_draft_tokens is None:
            parsed.num_draft_tokens = self.num_draft_tokens
        return parsed

    def _check(self, parsed: argparse.Namespace) -> None:
        if getattr(parsed, "draft_model", None) is not None:
            self.error("argument --mtp: not allowed with argument --draft-model")
        if getattr(parsed, "batch_size", 1) != 1:
            self.error("argument --mtp: needs --batch-size 1")
        if parsed.num_draft_tokens is not None:
            try:
                check_num_draft_tokens(parsed.num_draft_tokens)
            except ValueError as error:
                self.error(f"argument --num-draft-tokens: {error}")


def setup_arg_parser(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    parser = wrapped(*args, **kwargs)
    parser.__class__ = SpeculationParser
    parser.num_draft_tokens = parser.get_default("num_draft_tokens")
    if parser.num_draft_tokens is None:
        parser.add_argument("--num-draft-tokens", type=int, help=NUM_DRAFT_TOKENS_HELP)
    # None tells a default from a number that was asked for.
    parser.set_defaults(num_draft_tokens=None)
    parser.add_argument(
        "--mtp", nargs="?", const=True, default=None, metavar="PATH", help=MTP_HELP
    )
    return parser


def main(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    token = command_line.set(CommandLineRequest())
    try:
        return wrapped(*args, **kwargs)
    except SpeculationError as error:
        sys.exit(f"error: {error}")
    finally:
        command_line.reset(token)
