"""Builds the operator's kernels; everything else about the package stands in pyproject.toml.

`dcnv3._C` (CPU) is built wherever torch and a C++ compiler are; `dcnv3._C_cuda` as well where a CUDA toolkit and a CUDA
build of torch are and it is asked for or a GPU is visible. A build that fails says so and leaves the operator on its
PyTorch backend, which needs no compiler.

    DCNV3_CPU=0      do not build the CPU kernels
    DCNV3_CUDA=1     build the CUDA kernels without a visible GPU too (TORCH_CUDA_ARCH_LIST says for which)
    DCNV3_CUDA=0     do not build them
    DCNV3_REQUIRE=1  fail where a kernel that was asked for cannot be built
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

CSRC = Path("dcnv3/csrc")
FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-g0",
]
REQUIRED = os.environ.get("DCNV3_REQUIRE") == "1"


def say(message: str) -> None:
    print(f"dcnv3: {message}", file=sys.stderr)


def target_version(torch_version: str) -> str:
    """The oldest torch the build will load in: 2.10, whose stable ABI has threads; 2.9 where that is what is here."""
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return "0x020A000000000000" if (major, minor) >= (2, 10) else "0x0209000000000000"


def cuda_wanted(torch) -> bool:
    asked = os.environ.get("DCNV3_CUDA")
    if asked:  # set but empty is not asked
        return asked != "0"
    return torch.version.cuda is not None and torch.cuda.is_available()


def extensions() -> tuple[list, type]:
    """The extensions that can be tried here, and the command that builds them."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        say(f"no kernels are built, torch cannot be imported here ({error}); the operator will use its PyTorch backend")
        if REQUIRED:
            raise
        return [], build_ext

    definition = f"-DTORCH_TARGET_VERSION={target_version(torch.__version__)}"
    modules = []
    headers = sorted(str(path) for path in CSRC.glob("**/*.*h"))
    if os.environ.get("DCNV3_CPU") != "0":
        modules.append(
            cpp_extension.CppExtension(
                "dcnv3._C",
                sorted(str(path) for path in CSRC.glob("cpu/*.cpp")),
                depends=headers,
                extra_compile_args={"cxx": [*FLAGS, definition]},
                py_limited_api=True,
            )
        )
    if cuda_wanted(torch):
        if cpp_extension.CUDA_HOME is None or torch.version.cuda is None:
            say("no CUDA kernels are built: set CUDA_HOME to a toolkit, and have a CUDA build of torch")
            if REQUIRED:
                raise RuntimeError("DCNV3_CUDA=1 and DCNV3_REQUIRE=1, but no CUDA toolkit or no CUDA build of torch")
        else:
            modules.append(
                cpp_extension.CUDAExtension(
                    "dcnv3._C_cuda",
                    sorted(str(path) for pattern in ("*.cu", "*.cpp") for path in CSRC.glob(f"cuda/{pattern}")),
                    depends=headers,
                    extra_compile_args={
                        "cxx": [*FLAGS, definition],
                        "nvcc": ["-O3", definition, "-DUSE_CUDA", "--expt-relaxed-constexpr", "-lineinfo"],
                    },
                    py_limited_api=True,
                )
            )

    class Build(cpp_extension.BuildExtension):
        """Each extension by itself: one that cannot be built is left out, with the reason."""

        def build_extensions(self) -> None:
            for extension in list(self.extensions):
                self.extensions = [extension]
                try:
                    super().build_extensions()
                except (Exception, SystemExit) as error:
                    if REQUIRED:
                        raise
                    say(f"{extension.name} was not built: {error}")
                    say("the package works without it, through another backend; DCNV3_REQUIRE=1 makes this an error")
                    modules.remove(extension)
            self.extensions = modules

        def copy_extensions_to_source(self) -> None:
            self.extensions = [extension for extension in self.extensions if extension in modules]
            super().copy_extensions_to_source()

    return modules, Build


modules, command = extensions()
setup(
    ext_modules=modules,
    cmdclass={"build_ext": command},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if modules else {},
)
