"""What a page wants served, checked, and the command line for it."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .._options import API_KEY_VARIABLE, MAX_DRAFT_TOKENS
from ._flags import Flag
from ._models import HEAD, MODEL, LocalModel
from ._process import OFFLINE

SAMPLING_FLAGS = {
    "temperature": ("--temp", 0.0, 100.0),
    "top_p": ("--top-p", 0.0, 1.0),
    "top_k": ("--top-k", 0, 1_000_000),
    "min_p": ("--min-p", 0.0, 1.0),
}
PROMPT_LOOKUP = "--prompt-lookup"  # It drafts without a drafter.
FIRST_FREE_PORT = 1024
API_KEY = re.compile(r"[!-~]{1,200}")
ORIGINS = re.compile(r"\*|https?://[\w.:\[\]-]+(,https?://[\w.:\[\]-]+){0,19}")


@dataclass(frozen=True)
class Launch:
    """A server that can be started.

    Args:
        model (LocalModel): The target.
        uses_mtp (bool): Whether its MTP head drafts.
        drafter (LocalModel, optional): What drafts instead.
        port (int): On loopback.
        api_key (str, optional): That the server asks for.
        origins (str): Of the web pages that may ask the server, separated by commas.
        arguments (tuple): All others of the command line.
        settings (dict): What the page sent.
    """

    model: LocalModel
    uses_mtp: bool
    drafter: LocalModel | None
    port: int
    api_key: str | None
    origins: str
    arguments: tuple[str, ...]
    settings: dict[str, Any] = field(compare=False)

    @property
    def command(self) -> list[str]:
        """The command line."""
        command = ["mlx_lm.server", "--model", self.model.source]
        command += ["--mtp"] if self.uses_mtp else self.draft
        command += [*self.arguments, "--port", str(self.port)]
        return [*command, "--allowed-origins", self.origins]

    @property
    def environment(self) -> dict[str, str]:
        """What its environment has; others could read the key on its command line."""
        return {**OFFLINE, API_KEY_VARIABLE: self.api_key or ""}

    @property
    def shell_command(self) -> str:
        """The command line as a shell takes it."""
        models = [each for each in (self.model, self.drafter) if each is not None]
        names = {each.source: each.shell_source for each in models}
        parts = [names.get(part) or shlex.quote(part) for part in self.command]
        if self.api_key:
            parts.insert(0, f"{API_KEY_VARIABLE}={shlex.quote(self.api_key)}")
        return " ".join(parts)

    @property
    def draft(self) -> list[str]:
        """What names another drafter to the server and to ``bench``."""
        return ["--draft", self.drafter.source] if self.drafter else []

    @property
    def is_speculative(self) -> bool:
        return self.uses_mtp or self.drafter is not None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """With which the server answers."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def read_launch(
    settings: Any, models: Mapping[str, LocalModel], flags: Mapping[str, Flag]
) -> Launch:
    """Understand what a page sent.

    Args:
        settings: From JSON.
        models (dict): Those that may be named.
        flags (dict): Those that may be set.

    Raises:
        ValueError: If it is not the settings of a server.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"expected an object, got {settings!r}")
    model = _model(settings.get("model"), models, "model")
    if model.kind != MODEL:
        raise ValueError(f"{model.name} is a drafter and serves no requests itself")
    drafter = None
    if (name := settings.get("drafter")) is not None:
        drafter = _model(name, models, "drafter")
    uses_mtp = settings.get("mtp", False) is True
    if uses_mtp and drafter is not None:
        raise ValueError("the MTP head and another drafter exclude each other")
    port = number("port", settings.get("port", 8080), FIRST_FREE_PORT, 65535)
    return Launch(
        model=model,
        uses_mtp=uses_mtp,
        drafter=drafter,
        port=port,
        api_key=_api_key(settings.get("api_key")),
        # mlx-lm's default would let every page on the web read replies.
        origins=_origins(settings.get("origins")) or f"http://127.0.0.1:{port}",
        arguments=(
            *_speculation(settings, uses_mtp, drafter),
            *_sampling(settings, uses_mtp or drafter is not None),
            *_others(_object(settings, "flags"), flags),
        ),
        settings=settings,
    )


def _model(name: Any, models: Mapping[str, LocalModel], what: str) -> LocalModel:
    if not isinstance(name, str) or name not in models:
        raise ValueError(f"{what}: {name!r} is not in the list of models")
    return models[name]


def _speculation(
    settings: Mapping[str, Any], uses_mtp: bool, drafter: LocalModel | None
) -> list[str]:
    has_drafter = uses_mtp or drafter is not None
    if not has_drafter and not _object(settings, "flags").get(PROMPT_LOOKUP):
        return []
    found = []
    depth = settings.get("num_draft_tokens", "auto")
    if depth != "auto":
        depth = number("num_draft_tokens", depth, 1, MAX_DRAFT_TOKENS)
        found += ["--num-draft-tokens", str(depth)]
    if has_drafter and (size := settings.get("draft_vocab")) is not None:
        if not uses_mtp and drafter is not None and drafter.kind != HEAD:
            raise ValueError("draft_vocab: only an MTP head takes a part of it")
        found += ["--draft-vocab", str(number("draft_vocab", size, 1, 10_000_000))]
    return found


def _sampling(settings: Mapping[str, Any], is_implied: bool) -> list[str]:
    given = _object(settings, "sampling")
    wants_recommended = settings.get("recommended", False) is True
    found = ["--recommended-sampling"] if wants_recommended and not is_implied else []
    for name, (flag, least, most) in SAMPLING_FLAGS.items():
        if (value := given.get(name)) is not None:
            found += [flag, f"{number(name, value, least, most):g}"]
    return found


def _others(given: Mapping[str, Any], flags: Mapping[str, Flag]) -> list[str]:
    if unknown := set(given) - set(flags):
        raise ValueError(f"flags: {', '.join(sorted(unknown))} cannot be set here")
    return [
        part for name, value in given.items() for part in flags[name].arguments(value)
    ]


def _object(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = settings.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, got {value!r}")
    return value


def number(name: str, value: Any, least: float, most: float) -> Any:
    """A number that a page sent.

    Args:
        name (str): Of what it is for.
        value: What was sent.
        least (float): The least that it may be; an ``int`` asks for a whole number.
        most (float): The most that it may be.

    Raises:
        ValueError: If it is no such number.
    """
    kinds = int if isinstance(least, int) else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= value <= most:
        kind = "a whole number" if isinstance(least, int) else "a number"
        raise ValueError(
            f"{name}: expected {kind} from {least} to {most}, got {value!r}"
        )
    return value


def _api_key(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not API_KEY.fullmatch(value):
        raise ValueError("api_key: expected up to 200 visible ASCII characters")
    return value


def _origins(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not ORIGINS.fullmatch(value):
        raise ValueError(
            f"origins: expected addresses such as http://localhost:3000 with commas in "
            f"between, or * for all pages, got {value!r}"
        )
    return value
