"""Installing where something is missing: each ends in a working operator, or in a message that says what to do."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dcnv3 import available_backends

ROOT = Path(__file__).parents[2]
# An editable install of this checkout would lend its own extension to the copy that has none.
TRY = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import torch, dcnv3
x, o, m = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 36), torch.randn(1, 4, 4, 18)
expected = dcnv3.dcnv3(x, o, m, groups=2, backend="reference")
assert torch.allclose(dcnv3.dcnv3(x, o, m, groups=2), expected, atol=1e-5)
backends = dcnv3.available_backends()
print(dcnv3.__file__, backends["cpu"], backends["cuda"], sep="|")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the package is built from, so that nothing is written here."""
    copy = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("dcnv3", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def install(source: Path, target: Path, **environment: str) -> str:
    """pip install into a folder, without dependencies and isolation (torch is here); what pip printed."""
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--target", str(target), str(source)],
        env={key: value for key, value in (os.environ | environment).items() if value},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def use(target: Path) -> tuple[str, str, str]:
    """Run the installed operator elsewhere: (where it was imported from, why no cpu, why no cuda)."""
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", TRY], cwd=target, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    where, cpu, cuda = done.stdout.strip().split("|")
    assert where.startswith(str(target))
    return where, cpu, cuda


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_without_nvcc_and_gpu_the_cpu_kernels_are_built(source: Path, tmp_path: Path) -> None:
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())
    install(source, tmp_path / "site", PATH=path, CUDA_HOME="", CUDA_PATH="", DCNV3_CUDA="")
    _, cpu, cuda = use(tmp_path / "site")
    assert cpu == "None"
    assert "DCNV3_CUDA=1" in cuda or cuda == "None"


@pytest.mark.slow
def test_with_the_compiler_hidden_it_says_so_and_works_through_pytorch(source: Path, tmp_path: Path) -> None:
    printed = install(source, tmp_path / "site", CXX="/nonexistent/c++", CC="/nonexistent/cc", DCNV3_CUDA="0")
    assert "dcnv3._C was not built" in printed and "DCNV3_REQUIRE=1" in printed
    _, cpu, _ = use(tmp_path / "site")
    assert "reinstall where a C++ compiler is at hand" in cpu


@pytest.mark.slow
def test_with_the_compiler_hidden_and_kernels_required_it_fails(source: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="/nonexistent/c"):
        install(
            source, tmp_path / "site", CXX="/nonexistent/c++", CC="/nonexistent/cc", DCNV3_CUDA="0", DCNV3_REQUIRE="1"
        )


@pytest.mark.slow
def test_cuda_asked_for_without_a_toolkit_is_told(source: Path, tmp_path: Path) -> None:
    printed = install(source, tmp_path / "site", CUDA_HOME="/nonexistent", DCNV3_CUDA="1", DCNV3_CPU="0")
    assert "CUDA" in printed and "was not built" in printed
    use(tmp_path / "site")


def of_setup(name: str) -> Callable[..., Any]:
    """A function of setup.py, which cannot be imported without building."""
    text = (ROOT / "setup.py").read_text()
    scope: dict[str, Any] = {"os": os}
    start = text.index(f"def {name}")
    exec(text[start : text.index("\n\n\n", start)], scope)
    return scope[name]


def test_one_build_serves_torch_2_10_and_later() -> None:
    """The oldest torch that is asked for at compile time, not the one that is here."""
    target = of_setup("target_version")
    assert [target(v) for v in ("2.9.1", "2.10.0", "2.15.0+cu130")] == ["0x0209000000000000"] + [
        "0x020A000000000000"
    ] * 2


UNSTABLE = re.compile(r"_Z\w*?N?K?(3c10|2at|5torch|6caffe2)[0-9]")  # C++ names of torch, mangled


def test_the_kernels_import_nothing_of_torch_but_its_stable_c_functions() -> None:
    """What one build for several torch versions rests on; torch's own bindings show what the pattern would find."""
    if available_backends()["cpu"] is not None or shutil.which("nm") is None:
        pytest.skip("no CPU kernels or no nm here")

    def imported(path: Path) -> list[str]:
        printed = subprocess.run(
            ["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True
        )
        return [line.split()[-1].partition("@")[0] for line in printed.stdout.splitlines()]

    names = imported(Path(importlib.import_module("dcnv3._C").__file__ or ""))
    assert [name for name in names if UNSTABLE.search(name)] == []
    assert all(re.match(r"(aoti_)?torch_", name) for name in names if "torch" in name)
    assert "torch_call_dispatcher" in names
    assert any(UNSTABLE.search(name) for name in imported(Path(torch.__file__).parent / "lib" / "libtorch_python.so"))


@pytest.mark.parametrize(
    ("asked", "gpu", "wanted"), [("1", False, True), ("0", True, False), ("", False, False), ("", True, True)]
)
def test_cuda_kernels_are_built_where_asked_for_or_a_gpu_is_visible(
    asked: str, gpu: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCNV3_CUDA", asked)
    fake = SimpleNamespace(version=SimpleNamespace(cuda="13.0"), cuda=SimpleNamespace(is_available=lambda: gpu))
    assert of_setup("cuda_wanted")(fake) is wanted


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_builds_again_after_a_change_of_any_kernel_source() -> None:
    printed = subprocess.run(["make", "-npq", "clean"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    line = next(line for line in printed.splitlines() if line.startswith("EXTENSION_SOURCES"))
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "dcnv3" / "csrc").rglob("*.*") if path.is_file()}
    assert len(sources) > 20 and sources <= set(line.split())
