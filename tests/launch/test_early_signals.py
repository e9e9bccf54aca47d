"""A request to stop that comes while torch is being imported is kept for the run."""

import os
import signal
import subprocess
import sys

import pytest

from pretrain.training.safeguards.interruption import Interruption


def test_a_signal_before_the_imports_is_kept_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Interruption() as early:
        assert early.reason is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert early.reason == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(("before", "reason"), [("SIG_DFL", "SIGHUP"), ("SIG_IGN", "None")])
def test_a_lost_terminal_asks_a_lone_process_to_stop_unless_nohup_ignores_it(before: str, reason: str) -> None:
    code = f"""
import os, signal
from pretrain.training.safeguards.interruption import Interruption
signal.signal(signal.SIGHUP, signal.{before})
with Interruption() as interruption:
    os.kill(os.getpid(), signal.SIGHUP)
    print(interruption.reason)
assert signal.getsignal(signal.SIGHUP) is signal.{before}
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.strip()) == (0, reason), ended.stderr
