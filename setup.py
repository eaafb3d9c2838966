"""Build of the native extensions. Metadata and tool settings are in pyproject.toml.

The CPU extension is built against the torch that is installed (``pip install --no-build-isolation``), when there is
one and a C++ compiler. Nothing here makes an installation fail: without the extension the package runs its PyTorch
references, and ``tgdp-fast info`` says what is missing.

Environment variables:
    TGDP_BUILD_CPU=0        do not build the CPU extension
    TGDP_REQUIRE_CPU=1      fail if it cannot be built
    TGDP_PORTABLE=1         without code for the instruction sets of x86-64, as on other processors
    TGDP_SANITIZE=1         build it with the address and undefined-behaviour sanitizers
"""

import glob
import os
import shutil
import sys

from setuptools import setup

REQUIRED = os.environ.get("TGDP_REQUIRE_CPU") == "1"
SANITIZE = os.environ.get("TGDP_SANITIZE") == "1"


def skip(reason: str) -> dict:
    """No extension, with the reason on standard error; an error if it is required."""
    message = f"tgdp_fast: the CPU extension is not built: {reason}"
    if REQUIRED:
        raise SystemExit(message)
    print(message, file=sys.stderr)
    return {}


def cpu_extension() -> dict:
    """Arguments of setup() that build tgdp_fast/_cpu, or none."""
    if os.environ.get("TGDP_BUILD_CPU", "1") == "0":
        return skip("TGDP_BUILD_CPU=0")
    if sys.platform != "linux":
        return skip(f"it is built on Linux only, and this is {sys.platform}")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return skip(f"no C++ compiler ({compiler}, g++) on PATH")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return skip(f"torch cannot be imported here ({error}); install it first and use --no-build-isolation")

    class Build(BuildExtension):
        """A build that reports what went wrong and leaves the rest of the installation alone."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                skip(f"the compiler failed: {error}")

        def copy_extensions_to_source(self) -> None:
            """For editable installs, where a failed build has nothing to copy."""
            built = [e for e in self.extensions if os.path.isfile(self.get_ext_fullpath(e.name))]
            self.extensions = [e for e in self.extensions if e in built or self._is_built(e)]
            super().copy_extensions_to_source()

        def _is_built(self, extension: object) -> bool:
            filename = self.get_ext_filename(self.get_ext_fullname(extension.name))
            return os.path.isfile(os.path.join(self.build_lib, filename))

    flags = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
    # Both are noise of the compiler about its own vector headers.
    flags += ["-Wno-maybe-uninitialized", "-Wno-psabi"]
    if os.environ.get("TGDP_PORTABLE") == "1":
        flags.append("-DTGDP_PORTABLE")
    link = ["-fopenmp"]
    if SANITIZE:
        flags += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        link += ["-fsanitize=address,undefined"]
    sources = ["csrc/bindings.cpp", "csrc/module.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
    headers = sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.inc", recursive=True))
    extension = CppExtension(
        "tgdp_fast._cpu", sources, depends=headers, extra_compile_args={"cxx": flags}, extra_link_args=link
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**cpu_extension())
