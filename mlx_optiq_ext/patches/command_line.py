"""Wrappers for the command lines of mlx-lm: their parsers and their ``main``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .._errors import SpeculationError
from .._options import (
    NumDraftTokens,
    check_draft_vocab,
    check_num_draft_tokens,
)
from ._request import Request, current

MTP_HELP = (
    "Speculate with the multi-token-prediction head of a Qwen3.5, Qwen3.6 or Qwen3.8 "
    "model. PATH names a separate head; by default it is looked for beside the model."
)
DRAFT_HELP = (
    "Speculate with the assistant of a Gemma-4 model, an MTP head that is stored by "
    "itself, or a smaller model with the same tokenizer. PATH is a folder or a Hub id."
)
NUM_DRAFT_TOKENS_HELP = (
    "Number of tokens to draft when using speculative decoding, or with --mtp, --draft "
    "and --prompt-lookup 'auto', their default: the number, 0 included, that is "
    "measured to be fastest."
)
DRAFT_VOCAB_HELP = (
    "Let the MTP head propose only N tokens (special ones, the prompt's, and those "
    "with the lowest ids) or those whose ids a file has, one a line or as a JSON list. "
    "Drafts cost less, and the output stays the same."
)
PROMPT_LOOKUP_HELP = (
    "Speculate with what followed the last tokens where they occurred before, in the "
    "prompt or the output. It needs no drafter and works for every model; with one, "
    "each round takes the faster of the two."
)
# This command gets neither --draft, as of all that it accepts only an ordinary draft
# model keeps anything of a prompt, nor --prompt-lookup, which keeps nothing on disk.
WITHOUT_DRAFT = "mlx_lm.cache_prompt"


class SpeculationParser(argparse.ArgumentParser):
    """A parser that checks the flags for speculation and stores them as the request."""

    # This is the default that mlx-lm's own parser has.
    num_draft_tokens: NumDraftTokens | None = None

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed = super().parse_args(args, namespace)
        self._check_one(parsed)
        draft = self._take_draft(parsed)
        prompt_lookup = getattr(parsed, "prompt_lookup", False)
        is_ours = parsed.mtp or draft is not None or prompt_lookup
        if is_ours:
            self._check(parsed)
        elif parsed.num_draft_tokens == "auto":
            self.error(
                "argument --num-draft-tokens: auto needs --mtp, --draft or "
                "--prompt-lookup"
            )
        has_drafter = parsed.mtp or draft is not None
        if getattr(parsed, "draft_vocab", None) is not None and not has_drafter:
            self.error("argument --draft-vocab: needs --mtp")
        if (request := current.get()) is not None:
            request.mtp, request.draft = parsed.mtp, draft
            request.num_draft_tokens = parsed.num_draft_tokens
            request.draft_vocab = getattr(parsed, "draft_vocab", None)
            request.prompt_lookup = prompt_lookup
        if parsed.num_draft_tokens is None:
            parsed.num_draft_tokens = "auto" if is_ours else self.num_draft_tokens
        return parsed

    def _check_one(self, parsed: argparse.Namespace) -> None:
        given = [
            flag
            for flag in ("--mtp", "--draft", "--draft-model")
            if getattr(parsed, flag[2:].replace("-", "_"), None) is not None
        ]
        if len(given) > 1:
            self.error(f"argument {given[0]}: not allowed with argument {given[1]}")

    def _take_draft(self, parsed: argparse.Namespace) -> str | None:
        """Return what ``--draft`` names, or ``--draft-model`` if it names a drafter."""
        draft_model = getattr(parsed, "draft_model", None)
        if draft_model is not None:
            from ..drafters import is_draft_model

            if not is_draft_model(draft_model):
                parsed.draft, parsed.draft_model = draft_model, None
        return getattr(parsed, "draft", None)

    def _check(self, parsed: argparse.Namespace) -> None:
        if parsed.num_draft_tokens is not None:
            try:
                check_num_draft_tokens(parsed.num_draft_tokens)
            except ValueError as error:
                self.error(f"argument --num-draft-tokens: {error}")


def setup_arg_parser(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    parser = wrapped(*args, **kwargs)
    parser.__class__ = SpeculationParser
    add_flags(parser, with_draft=wrapped.__module__ != WITHOUT_DRAFT)
    return parser


def add_flags(parser: SpeculationParser, with_draft: bool = True) -> None:
    """Add the flags for speculation that mlx-lm's parser does not have.

    Args:
        parser (SpeculationParser): The parser of a command.
        with_draft (bool): Whether the command can use a drafter that is named.
    """
    parser.num_draft_tokens = parser.get_default("num_draft_tokens")
    if parser.num_draft_tokens is None:
        parser.add_argument("--num-draft-tokens")
    (option,) = (a for a in parser._actions if a.dest == "num_draft_tokens")
    option.type, option.help = _read_number, NUM_DRAFT_TOKENS_HELP
    option.metavar = "N|auto"
    # None tells a default from a number that was asked for.
    option.default = None
    parser.add_argument(
        "--mtp", nargs="?", const=True, default=None, metavar="PATH", help=MTP_HELP
    )
    if with_draft:
        parser.add_argument("--draft", metavar="PATH", help=DRAFT_HELP)
        parser.add_argument(
            "--draft-vocab", type=_draft_vocab, metavar="N|FILE", help=DRAFT_VOCAB_HELP
        )
        parser.add_argument(
            "--prompt-lookup", action="store_true", help=PROMPT_LOOKUP_HELP
        )


def _draft_vocab(text: str) -> int | str:
    draft_vocab = int(text) if text.lstrip("+-").isdecimal() else text
    try:
        check_draft_vocab(draft_vocab)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return draft_vocab


def _read_number(text: str) -> NumDraftTokens:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as exc:
        message = f"expected a whole number or auto, got {text!r}"
        raise argparse.ArgumentTypeError(message) from exc


def main(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    token = current.set(Request())
    try:
        return wrapped(*args, **kwargs)
    except SpeculationError as error:
        sys.exit(f"error: {error}")
    finally:
        current.reset(token)
