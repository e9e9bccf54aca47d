"""The GPU check's runner: nothing that happens to a step stops the next, or loses what was found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
GPU = ROOT / "benchmarks" / "gpu"

GOOD = (
    "import record; record.record('good', {'n': 1}); record.record('good', {'n': 2}); record.headline('good', '2 | 3')"
)
KILLED = "import os, record, signal; record.record('killed', {'n': 1}); os.kill(os.getpid(), signal.SIGKILL)"
HANGS = """
import record, subprocess, sys, time
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
children = [subprocess.Popen(sleeper), subprocess.Popen(sleeper, start_new_session=True)]
record.record("hangs", {"pids": [child.pid for child in children]})
time.sleep(600)
"""
LEAVES = """
import record, subprocess, sys
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
record.record("leaves", {"pids": [left.pid]})
"""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module of benchmarks/gpu, with its siblings in reach as when it is run."""
    import importlib

    for folder in (GPU.parent, GPU):
        monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(GPU))
    return importlib.import_module


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_step_stops_another_and_all_keep_what_they_found(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check, steps = load("check"), load("steps")

    def step(name: str, source: str, seconds: float = 30) -> object:
        return steps.Step(name, "operator", seconds, (sys.executable, "-c", source))

    planned = [
        step("good", GOOD),
        step("fails", "import sys; print('words'); sys.exit('ValueError: no such\\nthing')"),
        step("raises", "{}['key']"),
        step("killed", KILLED),
        step("hangs", HANGS, 3),
        step("leaves", LEAVES),
        step("absent", "import record; record.not_here('absent', 'no CUDA device')"),
        steps.Step("missing", "operator", 5, (str(tmp_path / "nothing"),)),
        step("spoils", "import os; open(os.environ['CHECK_OUT'], 'a').close(); print('no error')"),
    ]
    began = time.monotonic()
    assert check.check(steps.Options(tmp_path / "out", small=True), planned) is False
    assert time.monotonic() - began < 60
    found = json.loads((tmp_path / "out" / "results.json").read_text())["steps"]
    outcomes = {name: its["outcome"] for name, its in found.items()}
    assert outcomes["good"] == outcomes["leaves"] == outcomes["spoils"] == "ok"
    assert outcomes["fails"] == "failed: ValueError: no such"
    assert outcomes["raises"] == "failed: KeyError: 'key'"
    assert outcomes["killed"].startswith("failed: killed by SIGKILL")
    assert outcomes["hangs"] == "time limit (3 s)"
    assert outcomes["absent"] == "not here"
    assert outcomes["missing"].startswith("failed: ") and "nothing" in outcomes["missing"]
    assert found["good"]["rows"] == [{"n": 1}, {"n": 2}] and found["killed"]["rows"] == [{"n": 1}]
    pids = found["hangs"]["rows"][0]["pids"] + found["leaves"]["rows"][0]["pids"]
    assert len(pids) == 3 and not any(alive(pid) for pid in pids)
    printed = (tmp_path / "out" / "table.md").read_text()
    assert printed.count("\n") == 2 + len(planned) and all(line.count("|") == 5 for line in printed.splitlines())
    assert "| absent | not here |" in printed and "no CUDA device" in printed and "2 / 3" in printed
    assert capsys.readouterr().out.endswith(printed)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "table.md", "log.txt"}


def test_results_that_are_no_json_are_begun_anew(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    check, steps = load("check"), load("steps")
    (tmp_path / "results.json").write_text('{"steps": {"a": ')
    planned = [steps.Step("good", "operator", 30, (sys.executable, "-c", GOOD))]
    assert check.check(steps.Options(tmp_path, small=True), planned) is True
    assert list(json.loads((tmp_path / "results.json").read_text())["steps"]) == ["good"]


def test_a_second_group_adds_to_the_results_of_the_first(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    check, steps = load("check"), load("steps")
    for name in ("one", "two", "one"):
        planned = [
            steps.Step(name, "operator", 30, (sys.executable, "-c", f"import record; record.record('{name}', {{}})"))
        ]
        check.check(steps.Options(tmp_path, small=True), planned)
    found = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert {name: len(its["rows"]) for name, its in found.items()} == {"two": 1, "one": 1}


def test_a_list_of_steps_that_cannot_be_made_is_a_step_that_fails(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, steps = load("check"), load("steps")

    def broken(options: object) -> None:
        raise ImportError("no module named 'pydantic'")

    monkeypatch.setattr(load("operator_steps"), "steps", broken)
    options = steps.Options(tmp_path, small=True)
    planned = check.plan(options, ("operator",), ())
    assert [step.name for step in planned] == ["prepare", "operator"]
    assert check.check(options, planned[1:]) is False
    assert "cannot be listed: ImportError: no module named 'pydantic'" in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit, match="--only: no step is called nothing; there are prepare, operator"):
        check.plan(options, ("operator",), ("nothing",))


def make_wheel(folder: Path) -> None:
    """A wheel of a package that the check looks for, of a version that nobody has."""
    about = "open_clip_torch-0.0.1.dist-info"
    with zipfile.ZipFile(folder / "open_clip_torch-0.0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: open_clip_torch\nVersion: 0.0.1\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "".join(f"{about}/{name},,\n" for name in ("METADATA", "WHEEL", "RECORD")))


def test_the_command_installs_the_wheelhouse_and_ends_with_a_table(tmp_path: Path) -> None:
    make_wheel(tmp_path)
    command = [GPU / "check.sh", "operator", "--small", "--only", "prepare", "--out", tmp_path / "out"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        [*command, "--wheelhouse", tmp_path], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| prepare | ok |" in done.stdout and "Traceback" not in done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["machine"]["torch"]
    assert found["steps"]["prepare"]["rows"][0]["versions"]["open_clip_torch"] == "0.0.1"


def test_a_wheelhouse_or_folder_that_is_unusable_is_told(tmp_path: Path) -> None:
    (tmp_path / "x-1-py3-none-any.whl").write_text("no wheel")
    command = [GPU / "check.sh", "operator", f"--wheelhouse={tmp_path}", "--peers", tmp_path / "no"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    *_, install, last = done.stderr.strip().splitlines()
    assert done.returncode == 1 and last == f"--peers: no folder {tmp_path / 'no'}"
    assert install.startswith(f"the wheelhouse {tmp_path} could not be installed")


@pytest.mark.parametrize(
    ("working", "said"),
    [
        ("own", "the checkout"),
        ("packed", "a build made beforehand"),
        ("built", "a build made here"),
        ("none", "the CUDA kernels were built but do not work: bad"),
    ],
)
def test_the_first_library_that_works_is_taken(
    working: str, said: str, load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = load("prepare")
    places = {
        "own": tmp_path / "tree" / "dcnv3",
        "packed": tmp_path / "wheelhouse" / "lib",
        "built": tmp_path / "build",
    }
    for name, folder in places.items():
        folder.mkdir(parents=True)
        (folder / "_C_cuda.abi3.so").write_text(name)
    own = places["own"] / "_C_cuda.abi3.so"
    monkeypatch.setattr(prepare, "ROOT", tmp_path / "tree")
    monkeypatch.setattr(prepare, "built", lambda: places["built"] / "_C_cuda.abi3.so")
    monkeypatch.setattr(prepare, "fault", lambda: None if own.read_text() == working else "bad")
    monkeypatch.setattr(sys, "path", [])
    if working == "none":
        with pytest.raises(SystemExit, match=said):
            prepare.cuda_library(tmp_path / "wheelhouse")
    else:
        assert prepare.cuda_library(tmp_path / "wheelhouse") == said
        assert own.read_text() == working


BLOCKER = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"pydantic", "deepspeed", "open_clip", "webdataset", "simplejpeg", "pycocotools"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def test_the_operators_steps_need_torch_alone(tmp_path: Path) -> None:
    """The whole group in its reduced form, where what the GPU's machines lack is hidden."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    hidden = [sys.executable, "-c", "import pydantic"]
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    assert subprocess.run(hidden, env=environment, capture_output=True, timeout=60).returncode == 1
    command = [GPU / "check.sh", "operator", "--small", "--out", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert "Traceback" not in done.stdout + done.stderr + log
    found = json.loads((tmp_path / "out" / "results.json").read_text())["steps"]
    assert list(found) == ["prepare", "tests", "kernels", "ceilings", "counters", "sanitizer", "beside"]
    assert {its["outcome"] for its in found.values()} <= {"ok", "not here"} and found["tests"]["outcome"] == "ok"
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_runs_over_made_up_batches_are_read_as_any_run(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    from pretrain.training import run

    runs, output = load("training_runs"), tmp_path / "run"
    assert run(runs.made_up(runs.tiny(stop_after=2)), output) == 75
    found = load("zero_stages").curve_of(output)
    assert len(set(found.losses)) == 2 and found.weights.keys() == found.average.keys()


def test_the_memory_step_trains_without_leaving_a_checkpoint(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.training.distributed import join

    monkeypatch.setenv("CHECK_OUT", str(tmp_path / "results.json"))
    load("model_memory").rows_of("H", join(60.0), tmp_path / "H", tiny=True)
    rows = json.loads((tmp_path / "results.json").read_text())["steps"]["memory"]["rows"]
    assert [(row["batch"], row["recompute"]) for row in rows] == [(2, "blocks"), (4, "blocks")]
    assert all(row["predicted_gb"] > 0 and row["two_steps_s"] > 0 for row in rows)
    assert not list((tmp_path / "H").rglob("step-*"))
