"""The start-up hook, which imports only `os` and `sys` as every interpreter runs it."""

import os
import sys


def switched_off() -> bool:
    """Tell whether the environment says that mlx-lm is to be left as it is."""
    return os.environ.get("MLX_OPTIQ_EXT") == "0"


def module_run_as_main() -> "str | None":
    """Return the NAME of `python -m NAME` while Python is still looking for it."""
    if sys.argv[:1] != ["-m"]:
        return None
    # Everything after the name is in sys.argv, too.
    option = sys.orig_argv[-len(sys.argv)]
    return option.partition("m")[2] if option.startswith("-") else option


class Trigger:
    """A meta path entry that patches mlx-lm when it is first looked up."""

    armed = True

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if self.armed and name == "mlx_lm":
            self.fire()

    def fire(self) -> None:
        self.armed = False
        # An exception here would make the import of mlx-lm fail.
        try:
            from ._interrupts import stop_server_while_imported

            stop_server_while_imported()
            from . import patches

            patches.apply()
        except Exception as exc:
            stand_aside(f"{type(exc).__name__}: {exc}")


def stand_aside(reason: str) -> None:
    """Warn that nothing is patched, without raising even under `-W error`.

    Args:
        reason (str): Why mlx-lm cannot be patched.
    """
    import warnings

    from ._interrupts import release

    release()
    message = f"mlx-optiq-ext leaves mlx-lm as it is: {reason}"
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        import logging

        logging.getLogger(__package__).warning(message)


def install() -> None:
    """Patch mlx-lm as soon as it is imported, or now if it already is."""
    # `site` runs the start-up files of a virtual environment twice.
    if switched_off() or any(isinstance(entry, Trigger) for entry in sys.meta_path):
        return
    trigger = Trigger()
    sys.meta_path.insert(0, trigger)
    if "mlx_lm" in sys.modules:
        trigger.fire()
