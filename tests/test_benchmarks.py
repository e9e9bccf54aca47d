"""What the benchmarks share: the record of where, when and of which code a figure was measured."""

import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    return subprocess.run(["git", "-C", folder, *who, *arguments], capture_output=True, text=True, check=True).stdout


def test_the_record_tells_threads_versions_and_load(load_benchmark: Callable[[str], ModuleType]) -> None:
    record = load_benchmark("machine").machine("numpy")
    assert record["threads"] == torch.get_num_threads() and record["device"] == "cpu" and record["cores"] >= 1
    assert record["torch"] == torch.__version__ and record["numpy"][0].isdigit()
    assert record["load_average_before"] >= 0 and record["memory_gb"] > 0.1
    with pytest.raises(PackageNotFoundError):
        load_benchmark("machine").machine("no-such-distribution")


def test_changes_of_the_code_are_told_and_those_of_results_are_not(
    load_benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    code = load_benchmark("machine").code
    here = tmp_path / "benchmarks"
    (here / "results").mkdir(parents=True)
    files = [here / "results" / "a.json", here / "a.py", tmp_path / "b.py"]
    for file in files:
        file.write_text("1\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--message", "one")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert code(here) == (commit, False)
    files[0].write_text("2\n")
    assert code(here) == (commit, False)
    files[2].write_text("2\n")
    assert code(here) == (commit, True)


def test_code_without_git_has_no_commit(
    load_benchmark: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = load_benchmark("machine").code
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code(tmp_path) == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code(ROOT) == (None, None)
