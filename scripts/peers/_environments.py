"""Starts processes that decode, each in the environment of its decoder."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import mlx.core as mx

SCRIPTS = Path(__file__).resolve().parents[1]
PEERS = {"vlm": "mlx-vlm==0.7.10", "optiq": "mlx-optiq==0.7.7"}
# Decoding takes one thread; what a BLAS gains by more depends on other programs.
THREADS = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)


class Process:
    """A decoder that waits for requests; none runs while another one works.

    Args:
        module (str): The module of this package to run: ``ours``, or one of ``PEERS``.
        python (Path): The interpreter of its environment.
        folder (Path): The folder of the model.
        draft (Path): The folder of its drafter, or of the model if its files have the
          head.
    """

    def __init__(self, module: str, python: Path, folder: Path, draft: Path):
        self._process = subprocess.Popen(
            [python, "-m", f"peers.{module}", folder, draft],
            cwd=SCRIPTS,
            env=os.environ | THREADS | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.error: str | None = self._read().get("error")

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the reply to a request; after an error nothing more is asked."""
        if self.error is not None:
            return {"error": self.error}
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        reply = self._read()
        self.error = reply.get("error")
        return reply

    def end(self) -> None:
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return dict(json.loads(line))
        return {"error": f"the process ended with code {self._process.wait()}"}


def prepare(peer: str, folder: Path, extra: str) -> Path:
    """Install a peer in an environment of its own, unless it is there.

    Args:
        peer (str): The name of the peer, one of ``PEERS``.
        folder (Path): The folder of all environments.
        extra (str): The extra of mlx for its backend: ``cpu``, ``cuda12``, ``cuda13``
          or none.

    Returns:
        Path: The interpreter of that environment.
    """
    place = folder / f"{peer}-{extra or 'default'}"
    python, done = place / "bin" / "python", place / "installed"
    backend = f"[{extra}]" if extra else ""
    requirements = [PEERS[peer], f"mlx{backend}=={mx.__version__}"]
    if not done.is_file() or done.read_text().split() != requirements:
        print(f"Installing {' '.join(requirements)}", file=sys.stderr)
        venv.create(place, clear=True, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *requirements], check=True
        )
        done.write_text("\n".join(requirements))
    return python


def default_extra() -> str:
    return "" if platform.system() == "Darwin" else "cpu"
