"""Golden numbers and the operator's tests on a GPU, through the compiled kernels and through Triton's, side by side.

Each part is a pytest of its own: an error that leaves the GPU unusable to a process spoils that part alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import headline, record, small
from steps import ROOT

from dcnv3 import available_backends

STEP = "tests"
LIMIT = 110.0  # seconds, of all parts together
TESTS = "tests/dcnv3/"
OTHERS = ("test_registration.py", "test_arguments.py", "test_packed.py", "test_triton.py")
EVERY_TYPE = "every_type"


@dataclass(frozen=True)
class Part:
    kernels: str
    name: str
    files: tuple[str, ...]
    choice: str = ""  # pytest's -k
    marks: str = "gpu"


def parts() -> list[Part]:
    """Triton compiles for a second in every geometry, so its tests are in more parts."""
    if not torch.cuda.is_available():
        return [Part("cpu", "golden", ("test_golden.py",), "float32", "")]
    every = [
        Part("cuda", "golden", ("test_golden.py",)),
        Part("triton", "golden", ("test_golden.py",)),
        Part("cuda", "gradients", ("test_gradients.py",)),
        Part("triton", "every type", ("test_gradients.py",), EVERY_TYPE),
        Part("triton", "gradients", ("test_gradients.py",), f"not {EVERY_TYPE}"),
        Part("cuda", "registration", OTHERS),
        Part("triton", "registration", OTHERS[:2]),
        Part("triton", "packed", OTHERS[2:3]),
    ]
    # where the compiled kernels are missing, tests without DCNV3_TEST_TRITON would be Triton's too
    return [part for part in every if part.kernels == "triton" or available_backends()["cuda"] is None]


def start(part: Part, report: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", *(TESTS + name for name in part.files), "-m", part.marks]
    command += ["-k", part.choice, "-p", "no:cacheprovider", "-o", "timeout=90", f"--junitxml={report}"]
    environment = {
        "DCNV3_TEST_TRITON": str(int(part.kernels == "triton")),
        "DCNV3_CUDA_NORMS": "1",
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment)


def counts(report: Path) -> dict[str, Any]:
    """What a junit report holds: {tests, failures, errors, skipped, seconds, failed: [{test, message}]}."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        return {"failed": [{"test": "", "message": "the report holds no tests"}]}
    row: dict[str, Any] = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    row["seconds"] = round(float(suite.get("time", 0)), 1)
    row["failed"] = [
        {"test": f"{case.get('classname')}.{case.get('name')}", "message": (fault.get("message") or "")[:300]}
        for case in suite.iter("testcase")
        for fault in [*case.findall("failure"), *case.findall("error")]
    ]
    slow = sorted(suite.iter("testcase"), key=lambda case: -float(case.get("time", 0)))[:3]
    row["slowest"] = {str(case.get("name")): round(float(case.get("time", 0)), 1) for case in slow}
    return row


def ended(part: Part, status: int | None, report: Path) -> dict[str, Any]:
    """The row of a part: its counts, or why there are none (status None: it was stopped at the limit)."""
    row: dict[str, Any] = {"kernels": part.kernels, "part": part.name, "status": status}
    try:
        row |= counts(report)
    except (OSError, ElementTree.ParseError):
        row["failed"] = [
            {"test": part.name, "message": "time limit" if status is None else f"no report, exit {status}"}
        ]
    return row


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="gpu-tests-"))
    began = time.monotonic()
    reports = {part: folder / f"{number}.xml" for number, part in enumerate(parts())}
    running = {part: start(part, report) for part, report in reports.items()}
    rows: list[dict[str, Any]] = []
    missing = available_backends()["cuda"]
    if torch.cuda.is_available() and missing is not None:
        rows.append({"kernels": "cuda", "status": None, "failed": [{"test": "import", "message": missing}]})
        record(STEP, rows[-1])
    while running:
        late = time.monotonic() - began > LIMIT
        for part, child in list(running.items()):
            status = child.poll()
            if status is None and late:
                child.kill()
                child.wait()
            if status is not None or late:
                del running[part]
                rows.append(ended(part, status, reports[part]))
                record(STEP, rows[-1])
                headline(STEP, words(rows))
        time.sleep(0.2)
    if any(row["failed"] or row["status"] != 0 for row in rows):
        raise SystemExit(f"Error: {words(rows)}")


def words(rows: list[dict[str, Any]]) -> str:
    """Of each kind of kernels: tests passed of those that ran."""
    said = []
    for kernels in dict.fromkeys(row["kernels"] for row in rows):
        its = [row for row in rows if row["kernels"] == kernels]
        ran = sum(row.get("tests", 0) - row.get("skipped", 0) for row in its)
        bad = sum(len(row["failed"]) for row in its)
        said.append(f"{kernels}: {ran - bad} of {ran} passed" if ran else f"{kernels}: none ran")
        if bad:
            said[-1] += f", first {next(fault['test'].rpartition('.')[2] for row in its for fault in row['failed'])}"
    return "; ".join(said)


if __name__ == "__main__":
    small()  # the form is chosen by whether there is a GPU
    main()
