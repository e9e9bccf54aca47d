"""A request to stop that comes while torch is being imported is kept for the run."""

import os
import signal

from pretrain.training.interruption import Interruption


def test_what_the_command_line_noted_before_the_imports_reaches_the_run() -> None:
    early = Interruption().install()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        later = Interruption().install()
        try:
            assert later.reason == "SIGUSR1"
        finally:
            later.remove()
    finally:
        early.remove()


def test_a_run_without_an_early_signal_begins_without_a_reason() -> None:
    with_nothing = Interruption().install()
    try:
        assert with_nothing.reason is None
    finally:
        with_nothing.remove()
