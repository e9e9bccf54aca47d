"""What is packed for a machine without a network: the decisions one by one, then a folder made and installed."""

import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from data_pipeline.errors import UserError
from launch import wheelhouse
from launch.wheelhouse import Target, Wheel

ROOT = Path(__file__).resolve().parents[2]
TARGET = Target("3.12", Version("2.11"), "x86_64")


def write_wheel(folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any") -> Path:
    path = folder / f"{name}-{version}-{tag}.whl"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n\nRequires-Dist: in-the-prose\n")
    return path


class Index:
    """A package index in a folder. `fetched` are the names and specifiers asked for, in order."""

    def __init__(self, folder: Path, packages: Mapping[tuple[str, str], list[str]]) -> None:
        self.wheels = [wheelhouse.read_wheel(write_wheel(folder, *key, *needs)) for key, needs in packages.items()]
        self.fetched: list[str] = []

    def fetch(self, name: str, specifier: SpecifierSet) -> Wheel:
        self.fetched.append(f"{name}{specifier}")
        return max((w for w in self.wheels if w.name == name and w.version in specifier), key=lambda w: w.version)


@pytest.mark.parametrize(
    ("requirement", "packed"),
    [
        ("einops", True),  # not there
        ("PyYAML>=6", False),  # there, in a version nobody said; names are compared as pip does
        ("numpy>=1.26", False),
        ("numpy<2", True),  # there, too new
        ("torch>=2.9", False),
    ],
)
def test_what_is_absent_or_does_not_fit_is_missing(requirement: str, packed: bool) -> None:
    present = {"pyyaml": None, "numpy": Version("2.5.2"), "torch": Version("2.11.0+cu130")}
    assert wheelhouse.missing(Requirement(requirement), present) is packed


def test_pip_freeze_and_a_list_of_names_are_both_read() -> None:
    text = "# head\n\nnumpy==2.5.2\nTorch_Geometric  # any\ntorch==2.11.0+cu130\n-e git+https://h/p\nours @ file:///p\n"
    assert wheelhouse.read_versions(text, "machine.txt") == {
        "numpy": Version("2.5.2"),
        "torch-geometric": None,
        "torch": Version("2.11.0+cu130"),
        "ours": None,
    }


def test_a_line_that_names_no_package_is_refused_with_its_place() -> None:
    with pytest.raises(UserError, match=r"machine\.txt, line 2: 'numpy = 2'"):
        wheelhouse.read_versions("torch\nnumpy = 2\n", "machine.txt")


def test_markers_are_those_of_the_target_not_of_this_python() -> None:
    needs = [Requirement(f'p{minor}; python_version == "3.{minor}"') for minor in (11, 12, 13)]
    for python, name in (("3.11", "p11"), ("3.12", "p12"), ("3.13", "p13")):
        environment = Target(python, Version("2.11")).environment()
        assert [need.name for need in wheelhouse.applying(needs, (), environment)] == [name]
    assert Marker('python_full_version >= "3.12"').evaluate(TARGET.environment())


def test_a_wheel_gives_its_needs_and_whether_it_is_pure(tmp_path: Path) -> None:
    wheel = wheelhouse.read_wheel(write_wheel(tmp_path, "Some_Thing", "1.2", "numpy>=1", 'x; extra == "all"'))
    assert (wheel.name, wheel.version, wheel.pure) == ("some-thing", Version("1.2"), True)
    assert [str(need) for need in wheel.requires] == ["numpy>=1", 'x; extra == "all"']
    built = write_wheel(tmp_path, "compiled", "1", tag="cp312-cp312-linux_x86_64")
    assert not wheelhouse.read_wheel(built).pure


def test_needs_of_needs_are_packed_each_once(tmp_path: Path) -> None:
    packages = {
        ("a", "1"): ["b", "numpy", 'never; extra == "dev"', 'old; python_version < "3.12"'],
        ("b", "1"): ["a", "c[fast]>=1"],
        ("c", "2"): ['speed; extra == "fast"'],
        ("speed", "1"): [],
    }
    index = Index(tmp_path, packages)
    wheels = wheelhouse.resolve([Requirement("a")], {"numpy": None}, TARGET.environment(), index.fetch)
    assert [wheel.name for wheel in wheels] == ["a", "b", "c", "speed"]
    assert index.fetched == ["a", "b", "c>=1", "speed"]


def test_a_later_stricter_need_replaces_the_version(tmp_path: Path) -> None:
    packages = {("a", "1"): ["c<3"], ("c", "3"): [], ("c", "2"): ["d"], ("c", "1"): [], ("d", "1"): []}
    index = Index(tmp_path, packages)
    roots = [Requirement("c>=2"), Requirement("a")]
    wheels = wheelhouse.resolve(roots, {}, TARGET.environment(), index.fetch)
    assert [f"{wheel.name}-{wheel.version}" for wheel in wheels] == ["a-1", "c-2", "d-1"]


def test_torch_is_never_packed(tmp_path: Path) -> None:
    index = Index(tmp_path, {("a", "1"): ["torch>=2.12"]})
    with pytest.raises(UserError, match=r"torch>=2\.12 .*never packed"):
        wheelhouse.resolve([Requirement("a")], {"torch": Version("2.11")}, TARGET.environment(), index.fetch)
    assert index.fetched == ["a"]


@pytest.mark.parametrize(
    ("specifier", "pin", "asked"),
    [
        (">=1", "1.5", ["p==1.5", "p>=1"]),
        (">=2", "1.5", ["p>=2"]),  # the pin does not fit
        ("==2.50.4", None, ["p==2.50.4"]),
    ],
)
def test_the_pinned_version_is_tried_first_where_it_fits(specifier: str, pin: str | None, asked: list[str]) -> None:
    assert wheelhouse.attempts("p", SpecifierSet(specifier), Version(pin) if pin else None) == asked


@pytest.mark.parametrize(
    ("python", "torch", "message"),
    [("3.10", "2.11", ">=3.11"), ("3.12.1", "2.11", "two numbers"), ("3.12", "2.9.1", "stable|sources")],
)
def test_a_target_that_cannot_run_it_is_refused_first(python: str, torch: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        wheelhouse.check_target(Target(python, Version(torch)), ">=3.11")
    wheelhouse.check_target(TARGET, ">=3.11")


def test_the_oldest_torch_is_the_one_that_setup_builds_for() -> None:
    major, minor = wheelhouse.OLDEST_TORCH.release
    assert f"0x{major:02X}{minor:02X}000000000000" in (ROOT / "setup.py").read_text()


def test_too_large_a_folder_names_its_largest_files() -> None:
    sizes = {"small.whl": 1_000_000, "big.whl": 50_000_000}
    wheelhouse.check_size(sizes)
    with pytest.raises(UserError, match=r"61\.0 MB, more than 60 MB.* big\.whl \(50\.0 MB\), middle\.whl"):
        wheelhouse.check_size(sizes | {"middle.whl": 10_000_000})


def test_kernels_say_which_glibc_and_cuda_they_need() -> None:
    cuda = b"..GLIBC_2.34\0GLIBC_2.4\0libcudart.so.13\0"
    assert wheelhouse.kernel_facts({"_C_cuda.abi3.so": cuda, "_C.abi3.so": b"GLIBC_2.9"}) == (
        "_C.abi3.so _C_cuda.abi3.so, glibc 2.34 or newer, a CUDA 13 build of torch"
    )


@pytest.mark.parametrize(
    ("variable", "interpreter", "options"),
    [
        (["PYTHON=3.12", "TORCH=2.11"], "python3", "--python 3.12 --torch 2.11"),
        (["PYTHON=python3.13"], "python3.13", ""),
        (["ASSUMED=freeze.txt"], "python3", "--assumed freeze.txt"),
    ],
)
def test_make_tells_a_target_from_an_interpreter(variable: list[str], interpreter: str, options: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "TORCH", "MAKEFLAGS")}
    command = ["make", "-n", "wheelhouse", "VENV=/nowhere", *variable]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"\n{interpreter} -m venv /nowhere" in said
    found = re.search(r"-m launch\.wheelhouse(.*)", said.replace("\\\n", " "))
    assert found is not None and found[1].split() == options.split()


def assumed_site(folder: Path, packed: Mapping[str, object]) -> None:
    """Link into `folder` what this environment has of the assumed packages, their needs and pytest; nothing packed."""
    names = wheelhouse.read_versions((ROOT / "offline-assumed.txt").read_text(), "assumed")
    needs = [Requirement(name) for name in (*names, "pytest", "pytest-timeout")]
    environment = Target("{}.{}".format(*sys.version_info), Version("2.11")).environment()
    for need in needs:  # grows while it is read
        if canonicalize_name(need.name) in packed:
            continue
        distribution = importlib.metadata.distribution(need.name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
        further = wheelhouse.applying(map(Requirement, distribution.requires or ()), need.extras, environment)
        needs += [other for other in further if other not in needs]


@pytest.mark.slow
def test_the_folder_installs_without_an_index_and_the_kernels_are_right(tmp_path: Path) -> None:
    """A CPU wheelhouse for this Python, in an environment that has what is assumed and nothing else."""
    folder, fresh = tmp_path / "wheelhouse", tmp_path / "fresh"
    cpu = os.environ | {"DCNV3_CUDA": "0"}
    subprocess.run([sys.executable, "-m", "launch.wheelhouse", "--out", folder], cwd=ROOT, env=cpu, check=True)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], check=True)
    python = fresh / "bin" / "python"
    packed = wheelhouse.read_versions((folder / "requirements.txt").read_text(), "requirements.txt")
    assumed_site(next(fresh.glob("lib/python*/site-packages")), packed)
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}
    pip = f"{sys.executable} -m pip --python {python} install --quiet --no-index"
    install = f"{pip} --find-links wheelhouse -r wheelhouse/requirements.txt"
    subprocess.run(install.split(), env=bare, cwd=tmp_path, check=True)
    code = (
        "import dcnv3, deepspeed, pydantic, open_clip, webdataset, simplejpeg, pycocotools.mask, launch.cli\n"
        "print(dcnv3.__file__, dcnv3.available_backends()['cpu'])"
    )
    said = subprocess.run([python, "-c", code], env=bare, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1].startswith(str(fresh)) and said.stdout.endswith(" None\n")
    golden = ["-m", "pytest", "-p", "no:cacheprovider", "-k", "cpu-on-cpu", "tests/dcnv3/test_golden.py"]
    subprocess.run([python, *golden], env=bare, cwd=ROOT, check=True)
