"""A request to stop that comes while torch is being imported is kept for the run."""

import os
import signal

from pretrain.training.safeguards.interruption import Interruption


def test_a_signal_before_the_imports_is_kept_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Interruption() as early:
        assert early.reason is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert early.reason == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before
