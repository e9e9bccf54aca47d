"""Installing where something is missing: each ends in a working operator, or in a message that says what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRY = """
import sys, torch, dcnv3
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


def test_one_build_serves_torch_2_10_and_later() -> None:
    """The oldest torch that is asked for at compile time, not the one that is here."""
    text = (ROOT / "setup.py").read_text()
    scope: dict[str, object] = {}
    start = text.index("def target_version")
    exec(text[start : text.index("\n\n\n", start)], scope)
    target = scope["target_version"]
    assert callable(target)
    assert [target(v) for v in ("2.9.1", "2.10.0", "2.15.0+cu130")] == ["0x0209000000000000"] + [
        "0x020A000000000000"
    ] * 2
