"""`make wheelhouse`: a folder of wheels for a machine that has torch but no network (docs/offline.md).

    wheelhouse/*.whl             this project with its kernels, and those of its needs that the machine lacks
               requirements.txt  the same as names and versions; its head says which machine they are for
               SHA256SUMS        for `sha256sum --check` after the copy

Needs are read from pyproject.toml and then from each packed wheel's own METADATA. What the machine is taken to have
stands in offline-assumed.txt, preferred versions in constraints.txt. It is run from a checkout.
"""

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib.metadata import version as installed_version
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from data_pipeline.errors import UserError
from launch import exits

ROOT = Path(__file__).resolve().parents[1]
SIZE_LIMIT = 60_000_000  # bytes; what travels by hand or beside a job should stay small
NEVER_PACKED = ("torch", "torchvision")  # gigabytes, and bound to the machine's driver
OLDEST_TORCH = Version("2.10")  # the stable ABI that setup.py builds the kernels for
OLDEST_GLIBC = 28  # minor version: wheels up to manylinux_2_28 are taken
# Kernels for A100 and H100, and PTX that newer GPUs compile when they first load it. The caller's environment wins.
BUILD_DEFAULTS = {"DCNV3_CUDA": "1", "DCNV3_REQUIRE": "1", "TORCH_CUDA_ARCH_LIST": "8.0 9.0+PTX"}
SOURCE_ENVIRONMENT = {"DS_BUILD_OPS": "0"}  # DeepSpeed stays pure Python and compiles an operator where one is used

Present = Mapping[str, Version | None]  # canonical name -> version, None where any requirement is taken to be met


@dataclass(frozen=True)
class Target:
    """The machine that the wheels are for."""

    python: str  # "3.12"
    torch: Version
    machine: str = platform.machine()  # the kernels are compiled here, so the processor is this one's kind

    def environment(self) -> dict[str, str]:
        """The values that environment markers are evaluated with (PEP 508)."""
        here = {key: str(value) for key, value in default_environment().items()}
        full = f"{self.python}.0"
        return here | {
            "python_version": self.python,
            "python_full_version": full,
            "implementation_version": full,
            "platform_machine": self.machine,
        }

    def pip_options(self) -> list[str]:
        """Make `pip download` choose wheels for the target instead of for this interpreter."""
        platforms = [f"manylinux_2_{minor}_{self.machine}" for minor in range(OLDEST_GLIBC, 16, -1)]
        options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={self.python}"]
        return [*options, *(f"--platform={name}" for name in [*platforms, f"manylinux2014_{self.machine}"])]


@dataclass(frozen=True)
class Wheel:
    path: Path
    name: str
    version: Version
    pure: bool  # runs on every Python 3 and every machine
    requires: tuple[Requirement, ...]


def read_wheel(path: Path) -> Wheel:
    name, version, _, tags = parse_wheel_filename(path.name)
    with zipfile.ZipFile(path) as archive:
        metadata = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
    pure = any(tag.abi == "none" and tag.platform == "any" for tag in tags)
    return Wheel(path, name, version, pure, tuple(Requirement(text) for text in headers.get_all("Requires-Dist", [])))


def read_versions(text: str, source: str) -> dict[str, Version | None]:
    """Lines `name` or `name==version`, as `pip freeze` and constraints files have them -> version by canonical name."""
    versions: dict[str, Version | None] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line or line.startswith("-"):  # `-e PATH` and the like name no version
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            raise UserError(f"{source}, line {number}: {line!r} is neither `name` nor `name==version`") from error
        exact = re.fullmatch(r"==([^*,]+)", str(requirement.specifier))
        versions[canonicalize_name(requirement.name)] = Version(exact[1]) if exact else None
    return versions


def missing(requirement: Requirement, present: Present) -> bool:
    """Whether a machine with `present` lacks the package, or has it in a version that does not fit."""
    name = canonicalize_name(requirement.name)
    version = present.get(name)
    return name not in present or (version is not None and not requirement.specifier.contains(version, True))


def applying(
    requires: Iterable[Requirement], extras: Iterable[str], environment: Mapping[str, str]
) -> list[Requirement]:
    """Those whose marker holds in `environment` with any of `extras`, or with none."""
    tried = [{**environment, "extra": extra} for extra in ("", *extras)]
    return [need for need in requires if need.marker is None or any(need.marker.evaluate(case) for case in tried)]


def resolve(
    roots: Iterable[Requirement],
    present: Present,
    environment: Mapping[str, str],
    fetch: Callable[[str, SpecifierSet], Wheel],
) -> list[Wheel]:
    """Wheels that satisfy `roots` and, in turn, the wheels' own needs, where `present` does not; sorted by name.

    A later and stricter need for a package already fetched fetches it again under all the needs seen so far.
    """
    chosen: dict[str, Wheel] = {}
    asked: dict[str, SpecifierSet] = {}
    seen: set[str] = set()
    queue = applying(roots, (), environment)
    while queue:
        need = queue.pop(0)
        if str(need) in seen or not missing(need, present):
            continue
        seen.add(str(need))
        name = canonicalize_name(need.name)
        if name in NEVER_PACKED:
            raise UserError(
                f"{need} is needed and the machine is not taken to have it, but {name} is never packed: "
                "install it there first, and name it in the list of what is assumed"
            )
        asked[name] = asked.get(name, SpecifierSet()) & need.specifier
        if name not in chosen or not need.specifier.contains(chosen[name].version, True):
            chosen[name] = fetch(name, asked[name])
        queue += applying(chosen[name].requires, need.extras, environment)
    return [chosen[name] for name in sorted(chosen)]


def attempts(name: str, specifier: SpecifierSet, pin: Version | None) -> list[str]:
    """What to ask the index for, in order: the version of constraints.txt where it fits, else the newest that does."""
    fits = pin is not None and specifier.contains(pin, True)
    return [f"{name}=={pin}"] * fits + [f"{name}{specifier}"]


def check_target(target: Target, requires_python: str) -> None:
    """Raises UserError where this project cannot run on the target."""
    if not re.fullmatch(r"3\.\d+", target.python):
        raise UserError(f"PYTHON={target.python}: name the target's Python as two numbers, such as PYTHON=3.12")
    if not SpecifierSet(requires_python).contains(target.python):
        raise UserError(f"PYTHON={target.python}: the project needs Python {requires_python}")
    if target.torch < OLDEST_TORCH:
        raise UserError(
            f"TORCH={target.torch}: the kernels are built for torch {OLDEST_TORCH} and newer; with an older torch "
            "install from the sources on the machine itself (docs/operator.md)"
        )


def check_size(sizes: Mapping[str, int], limit: int = SIZE_LIMIT) -> None:
    """sizes: bytes by file name. Raises UserError that names the largest files where they are over the limit."""
    total = sum(sizes.values())
    if total > limit:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        listed = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
        raise UserError(
            f"the wheels take {total / 1e6:.1f} MB, more than {limit / 1e6:.0f} MB. Largest: {listed}. "
            "What the machine has already can be left out: name it in offline-assumed.txt"
        )


def kernel_facts(libraries: Mapping[str, bytes]) -> str:
    """Shared libraries by name -> one line: which there are, and which C library and CUDA they were linked with."""
    content = b"".join(libraries.values())
    glibc = max((int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", content)), default=17)
    cuda = re.search(rb"libcudart\.so\.(\d+)", content)
    facts = [" ".join(sorted(libraries)) or "no kernels", f"glibc 2.{glibc} or newer"]
    return ", ".join(facts + ([f"a CUDA {cuda[1].decode()} build of torch"] if cuda else []))


def requirements_text(wheels: Sequence[Wheel], target: Target, kernels: str) -> str:
    head = f"# For Python {target.python}, torch {target.torch}, Linux {target.machine}. Kernels: {kernels}\n"
    return head + "".join(f"{wheel.name}=={wheel.version}\n" for wheel in wheels)


def fetch_wheel(name: str, specifier: SpecifierSet, pin: Version | None, target: Target, folder: Path) -> Wheel:
    """Put one wheel for the target into `folder`, in place of another version's: from the index, else from source.

    Raises UserError where there is neither a wheel for the target nor a source that gives a pure Python one.
    """
    said = []
    for text in attempts(name, specifier, pin):
        for command in (["download", *target.pip_options()], ["wheel"]):
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                done = _pip([*command, "--no-deps", text], Path(fresh))
                found = list(Path(fresh).glob("*.whl"))
                if done.returncode == 0 and len(found) == 1:
                    wheel = read_wheel(found[0])
                    if wheel.pure or command[0] == "download":
                        for old in folder.glob(f"{found[0].name.split('-')[0]}-*.whl"):
                            old.unlink()
                        shutil.move(found[0], folder)
                        return read_wheel(folder / found[0].name)
                    said.append(f"{found[0].name} can be built here, but is not pure Python")
                else:
                    said.append(
                        next((line for line in done.stderr.splitlines()[::-1] if "ERROR" in line), "pip failed")
                    )
    raise UserError(f"{name}{specifier} cannot be had for Python {target.python}: " + "; ".join(dict.fromkeys(said)))


def build_own_wheel(folder: Path) -> Wheel:
    """Compile this checkout's wheel into `folder`, from nothing, so that no file of an earlier build slips in."""
    environment = BUILD_DEFAULTS | {key: value for key, value in os.environ.items() if value}
    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch, "setup.cfg")
        settings.write_text(f"[build]\nbuild_base = {scratch}/build\n")
        environment["DIST_EXTRA_CONFIG"] = str(settings)
        fresh = Path(scratch, "wheel")
        fresh.mkdir()
        done = _pip(["wheel", "--no-deps", "--no-build-isolation", str(ROOT)], fresh, environment)
        if done.returncode:
            raise UserError(
                f"the project's own wheel was not built:\n{done.stderr[-2000:]}\nCUDA kernels need a toolkit: "
                "set CUDA_HOME to the folder above its bin/nvcc. DCNV3_CUDA=0 packs the CPU kernels alone"
            )
        (built,) = fresh.glob("*.whl")
        shutil.move(built, folder)
        return read_wheel(folder / built.name)


def make(target: Target, assumed: Path, out: Path) -> list[Wheel]:
    """Fill `out`, whose earlier wheels go only once the new ones are whole and small enough."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    check_target(target, project["requires-python"])
    if not assumed.is_file():
        raise UserError(f"{assumed}: no such file; it lists what the machine has, as offline-assumed.txt does")
    present = read_versions(assumed.read_text(), str(assumed)) | {"torch": target.torch}
    pins = read_versions((ROOT / "constraints.txt").read_text(), "constraints.txt")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        folder = Path(scratch)

        def fetch(name: str, specifier: SpecifierSet) -> Wheel:
            wheel = fetch_wheel(name, specifier, pins.get(name), target, folder)
            print(f"  {wheel.name} {wheel.version}", flush=True)
            return wheel

        wheels = resolve(map(Requirement, project["dependencies"]), present, target.environment(), fetch)
        print(f"  {project['name']}: compiling (a minute or two)", flush=True)
        wheels = [build_own_wheel(folder), *wheels]
        check_size({wheel.path.name: wheel.path.stat().st_size for wheel in wheels})
        for old in out.glob("*.whl"):
            old.unlink()
        for wheel in wheels:
            shutil.move(wheel.path, out)
    with zipfile.ZipFile(out / wheels[0].path.name) as archive:
        libraries = {Path(entry).name: archive.read(entry) for entry in archive.namelist() if entry.endswith(".so")}
    (out / "requirements.txt").write_text(requirements_text(wheels, target, kernel_facts(libraries)))
    files = sorted([*out.glob("*.whl"), out / "requirements.txt"])
    sums = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    (out / "SHA256SUMS").write_text(sums)
    return wheels


def _pip(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        *arguments,
        "-w" if arguments[0] == "wheel" else "-d",
    ]
    environment = environment or (os.environ | SOURCE_ENVIRONMENT)
    return subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, check=False)


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a version such as 2.11") from error


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.wheelhouse", description="Pack wheels for an offline machine."
    )
    parser.add_argument(
        "--python", default="{}.{}".format(*sys.version_info), help="the target's (default: this one's)"
    )
    parser.add_argument("--torch", type=_version, default=installed_version("torch"), help="likewise")
    parser.add_argument("--assumed", type=Path, default=ROOT / "offline-assumed.txt", help="what the machine has")
    parser.add_argument("--out", type=Path, default=Path("wheelhouse"))
    options = parser.parse_args()
    wheels = make(Target(options.python, options.torch), options.assumed, options.out)
    total = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{len(wheels)} wheels, {total / 1e6:.1f} MB, in {options.out}. On the machine, beside a copy of the folder:")
    print("  python3 -m pip install --no-index --find-links wheelhouse -r wheelhouse/requirements.txt")
    return exits.DONE


if __name__ == "__main__":
    sys.exit(exits.guarded(main))
