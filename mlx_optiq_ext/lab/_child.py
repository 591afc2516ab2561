"""Runs one of the commands in a process that does not outlive the Lab.

``python -m mlx_optiq_ext.lab._child COMMAND ARGUMENTS`` is the command, except that it
ends when its standard input does. The Lab holds the other end of that pipe, so the
system closes it however the Lab ends, killed or not.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading

# The module whose ``main`` each command is.
MODULES = {
    "hf": "huggingface_hub.cli.hf",
    "mlx-optiq-ext": "mlx_optiq_ext.cli",
    "mlx_lm.server": "mlx_lm.server",
}
ORPHANED = 75


def main() -> None:
    threading.Thread(target=_watch, daemon=True).start()
    del sys.argv[0]
    module = importlib.import_module(MODULES[sys.argv[0]])
    sys.exit(module.main())


def _watch() -> None:
    while os.read(0, 1):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # with all that it started itself
    os._exit(ORPHANED)


if __name__ == "__main__":
    main()
