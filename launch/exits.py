"""What an exit code means, and how an error is shown. The constants stand in `data_pipeline.errors`.

| code | meaning |
|---|---|
| 0 | done |
| 1 | anything else |
| 2 | usage or configuration error |
| 3 | bad data beyond the allowed rate |
| 4 | gave up: non-finite losses, divergence, checkpoints that cannot be written |
| 5 | a hang: no step ended for `training.policy.hang_seconds` |
| 75 | stopped on request after saving: the same command continues |
| 130 | interrupted from the keyboard, nothing saved |
| 128 + n | a rank was ended by signal n (137: killed, 143: terminated) |

What starts again after which of them: `launch.restarting`.
"""

import os
import sys
import traceback
from collections.abc import Callable

from data_pipeline.errors import DONE, INTERRUPTED, OTHER, UserError

DEBUG_VARIABLE = "INTERNIMAGE_DEBUG"  # in the environment, so that the ranks of a run inherit it


def debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def guarded(command: Callable[[], object]) -> int:
    """Run `command`; whatever happens becomes an exit code, with one message on standard error.

    A command returns its exit code, or None for 0. Tracebacks are for `--debug` only.
    """
    try:
        result = command()
    except SystemExit as error:
        return _system_exit_code(error)
    except KeyboardInterrupt:
        return _say(INTERRUPTED, "interrupted")
    except UserError as error:
        return _say(error.exit_code, f"error: {error}")
    except BrokenPipeError:
        # The reader of our output has left (`| head`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OTHER
    except Exception as error:
        return _other(error)
    return result if isinstance(result, int) else DONE


def _other(error: Exception) -> int:
    if _is_usage_error(error):
        error.show()  # type: ignore[attr-defined]
        return int(error.exit_code)  # type: ignore[attr-defined]
    if type(error).__name__ == "Abort":  # older typer turns Ctrl-C into this
        return _say(INTERRUPTED, "interrupted")
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return _say(OTHER, f"error: {what}\n(run again with --debug for the traceback)")


def _is_usage_error(error: Exception) -> bool:
    """Typer's own errors, told by their shape: newer versions carry a private copy of click."""
    return callable(getattr(error, "show", None)) and hasattr(error, "exit_code")


def _system_exit_code(error: SystemExit) -> int:
    if error.code is None:
        return DONE
    if isinstance(error.code, int):
        return error.code
    return _say(OTHER, str(error.code))


def _say(code: int, message: str) -> int:
    if debugging() and sys.exc_info()[0] is not None:
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    speaker = "internimage" if rank == "0" else f"internimage (rank {rank})"
    print(f"{speaker}: {message}", file=sys.stderr, flush=True)
    return code
