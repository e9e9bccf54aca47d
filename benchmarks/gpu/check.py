"""The GPU check's runner: steps one after another, each a child with a time limit, results kept after each.

    OUT/results.json    every row that a step recorded (record.py)
    OUT/table.md        step, outcome, seconds, headline; written after each step, printed last
    OUT/log.txt         what the steps printed

Outcomes: ok, failed: the last error line, time limit, not here: the reason. The exit status is 1 where a step failed
or reached its limit. Run it through check.sh, which puts the wheelhouse within reach.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import record
from steps import HERE, ROOT, Options, Step, script

GROUPS = ("operator", "training")
OK, FAILED, TIME_LIMIT, ABSENT = "ok", "failed", "time limit", "not here"
MARK = "CHECK_STEP"  # environment of a step and of all that it starts, wherever they move to
LOG, RESULTS, TABLE = "log.txt", "results.json", "table.md"


def plan(options: Options, groups: tuple[str, ...], only: tuple[str, ...]) -> list[Step]:
    """The steps of the groups; a group whose list cannot be made is one step that fails with the reason."""
    wheelhouse = () if options.wheelhouse is None else ("--wheelhouse", str(options.wheelhouse))
    steps = [Step("prepare", "", 240, script("prepare.py", *wheelhouse))]
    for group in groups:
        try:
            steps += importlib.import_module(f"{group}_steps").steps(options)
        except Exception as error:
            words = f"{group}: its steps cannot be listed: {type(error).__name__}: {error}"
            steps.append(Step(group, group, 10, (sys.executable, "-c", f"raise SystemExit({words!r})")))
    unknown = set(only) - {step.name for step in steps}
    if unknown:
        names = ", ".join(step.name for step in steps)
        raise SystemExit(f"--only: no step is called {', '.join(sorted(unknown))}; there are {names}")
    return [step for step in steps if not only or step.name in only or step.name == "prepare"]


def run(step: Step, options: Options) -> tuple[str, float]:
    """(outcome, seconds) of a step; nothing that it started is left when this returns."""
    mark = f"{os.getpid()}:{step.name}"
    paths = [str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        record.OUT: str(options.out / RESULTS),
        record.SMALL: "1" if options.small else "0",
        MARK: mark,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
    }
    if options.small:  # threads of small tensors wait for each other more than they work
        environment |= {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    with (options.out / LOG).open("ab") as log:
        log.write(f"\n== {step.name}: {' '.join(step.command)}\n".encode())
        log.flush()
        start = log.tell()
        try:
            child = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"{FAILED}: {error}", 0.0
        try:
            status: int | None = child.wait(step.seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(child, mark)
    return outcome(status, options, step, start), time.monotonic() - began


def end(child: subprocess.Popen[bytes], mark: str) -> None:
    """Kill the step's process group, then what has left the group, until a look around finds nothing more."""
    with contextlib.suppress(ProcessLookupError):  # all of the group have ended
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    sought = f"{MARK}={mark}".encode()
    for _ in range(10):
        found = False
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # another user's, or it has just ended
                if sought in environ.read_bytes().split(b"\0"):
                    os.kill(int(environ.parent.name), signal.SIGKILL)
                    found = True
        if not found:
            return
        time.sleep(0.1)


def outcome(status: int | None, options: Options, step: Step, start: int) -> str:
    """What became of a step, from its exit status (None: it was stopped at its limit) and what it printed."""
    if status is None:
        return f"{TIME_LIMIT} ({step.seconds:g} s)"
    if status == 0:
        return OK
    if status == record.NOT_HERE:
        return ABSENT
    with (options.out / LOG).open("rb") as log:
        log.seek(start)
        printed = log.read().decode(errors="replace")
    last = error_line(printed)
    if status < 0:
        last = f"killed by {signal.Signals(-status).name}" + (f" after: {last}" if last else "")
    return f"{FAILED}: {last or f'exit status {status}'}"


def error_line(printed: str) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"([\w.]+(Error|Exception|Exit|Interrupt)\b|Error:|error:)", line)]
    return (named or lines or [""])[-1][:200]


def table(results: record.Results) -> str:
    """Markdown: a row a step."""
    rows = [("step", "outcome", "s", "figures"), ("---", "---", "---:", "---")]
    for name, its in results["steps"].items():
        rows.append((name, its["outcome"] or "running", f"{its['seconds']:.0f}", its["headline"]))
    clean = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in clean)


def keep(options: Options, step: str, outcome: str, seconds: float) -> record.Results:
    """Write a step's outcome and the table; the results so far."""
    results = record.read(options.out / RESULTS)
    its = record.entry(results, step)
    its["outcome"], its["seconds"] = outcome, round(seconds, 1)
    record.write(options.out / RESULTS, results)
    (options.out / TABLE).write_text(table(results))
    return results


def check(options: Options, steps: list[Step]) -> bool:
    """Run the steps; whether none failed or reached its limit."""
    options.out.mkdir(parents=True, exist_ok=True)
    results = record.read(options.out / RESULTS)
    for step in steps:  # what an earlier run into this folder found of them
        results["steps"].pop(step.name, None)
    record.write(options.out / RESULTS, results)
    good = True
    for step in steps:
        ended, seconds = run(step, options)
        results = keep(options, step.name, ended, seconds)
        good &= ended in (OK, ABSENT)
        print(f"{step.name}: {ended}, {seconds:.0f} s. {results['steps'][step.name]['headline']}", flush=True)
    print("\n" + table(results), end="", flush=True)
    return good


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="?", default="all", choices=[*GROUPS, "all"])
    parser.add_argument("--out", type=Path, help="default: $OUT, else benchmarks/results/gpu")
    parser.add_argument("--wheelhouse", type=Path, help="check.sh installs it; libraries are also looked for in it")
    parser.add_argument("--shards", type=Path, help="shards of the embedded set, made beforehand")
    parser.add_argument("--peers", type=Path, help="a folder of modules that wrap other implementations (peers.py)")
    parser.add_argument("--small", action="store_true", help="the reduced form, for a CPU")
    parser.add_argument("--only", default="", help="names of steps, with commas between")
    given = parser.parse_args(arguments)
    out = given.out or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu")
    folders = {}
    for name in ("wheelhouse", "shards", "peers"):
        folder = getattr(given, name)
        if folder is not None and not folder.is_dir():
            raise SystemExit(f"--{name}: no folder {folder}")
        folders[name] = None if folder is None else folder.resolve()
    options = Options(out.resolve(), given.small, **folders)
    groups = GROUPS if given.group == "all" else (given.group,)
    steps = plan(options, groups, tuple(name for name in given.only.split(",") if name))
    try:
        return 0 if check(options, steps) else 1
    except OSError as error:
        raise SystemExit(f"the results cannot be written: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
