"""What every test stands on."""

import signal

# A shell starts background commands with SIGINT ignored, children inherit that, and tests that send it wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
