"""The operator's steps, by value: whether it is right, then how fast it is, then why."""

from __future__ import annotations

from steps import Options, Step, script

GROUP = "operator"


def steps(options: Options) -> list[Step]:
    """Some 300 s in all on an H100: 60 of tests, 50 under the sanitizer, 30 of ceilings, 60, 60 and 40 of speed."""
    peers = () if options.peers is None else ("--peers", str(options.peers))
    return [
        Step("tests", GROUP, 120, script("gpu_tests.py")),
        Step("kernels", GROUP, 100, script("kernel_speed.py")),
        Step("ceilings", GROUP, 60, script("ceilings.py")),
        Step("counters", GROUP, 60, script("kernel_counters.py")),
        Step("sanitizer", GROUP, 125, script("sanitized.py")),
        Step("beside", GROUP, 60 if options.peers is None else 150, script("beside.py", *peers)),
    ]
