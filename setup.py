"""The list of packages, and the build of the native extensions. Metadata and tool settings are in pyproject.toml.

Extensions are built against the torch that is installed (``pip install --no-build-isolation``): the CPU extension when
there is one and a C++ compiler, the CUDA extension when that torch has CUDA and a toolkit of the same major version is
there, whether or not a GPU is. They use the limited API of Python and serve every version from 3.10 on, but one minor
version of torch each, which is written into them. Nothing here makes an installation fail: without an extension the
package runs what is left; the reason is installed with it, for ``tgdp-fast info`` and the warning at the first use.

Environment variables:
    TGDP_BUILD_CPU=0        do not build the CPU extension
    TGDP_REQUIRE_CPU=1      fail if it cannot be built
    TGDP_PORTABLE=1         without code for the instruction sets of x86-64, as on other processors
    TGDP_SANITIZE=1         build it with the address and undefined-behaviour sanitizers
    TGDP_BUILD_CUDA=0       do not build the CUDA extension
    TGDP_REQUIRE_CUDA=1     fail if it cannot be built
    TORCH_CUDA_ARCH_LIST    its architectures; default 8.0;8.6;9.0a;10.0;11.0;12.0+PTX, as far as the toolkit knows them
    CUDA_HOME               the toolkit; default that of nvcc on PATH
    MAX_JOBS                compilers at a time
    TGDP_TAG=1              the version of the wheel names torch and CUDA: +torch2.13
"""

import contextlib
import glob
import json
import os
import re
import select
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

SANITIZE = os.environ.get("TGDP_SANITIZE") == "1"
#: Each also serves later minor versions of its major one, but for those with a letter. Cards newer than all of them
#: compile the PTX that is added to the last.
ARCHITECTURES = ("8.0", "8.6", "9.0a", "10.0", "11.0", "12.0")
#: Why extensions are not built, by kind.
skipped: dict[str, str] = {}


def skip(kind: str, reason: str) -> None:
    """Say on standard error why the extension of this kind is not built; fail if it is required."""
    skipped[kind] = reason
    message = f"tgdp_fast: the {kind} extension is not built: {reason}"
    if os.environ.get(f"TGDP_REQUIRE_{kind}") == "1":
        raise SystemExit(message)
    print(message, file=sys.stderr)


def write_skipped(folder: str) -> None:
    """Leave the reasons where tgdp_fast/runtime/native.py looks for them; no file without one."""
    path = os.path.join(folder, "_not_built.json")
    if skipped and os.path.isdir(folder):
        with open(path, "w") as file:
            json.dump(skipped, file)
    elif os.path.isfile(path):
        os.remove(path)


class BuildPython(build_py):
    """A copy of the modules together with the reasons known so far: all of them if there is no extension to build."""

    def run(self) -> None:
        super().run()
        write_skipped("tgdp_fast" if self.editable_mode else os.path.join(self.build_lib, "tgdp_fast"))


def kind_of(extension: object) -> str:
    """CPU or CUDA."""
    return extension.name.rpartition("_")[2].upper()


def obstacle(kind: str) -> str | None:
    """Why no extension of this kind can be built here, as far as all of them need the same, or None."""
    if os.environ.get(f"TGDP_BUILD_{kind}", "1") == "0":
        return f"TGDP_BUILD_{kind}=0"
    if sys.platform != "linux":
        return f"it is built on Linux only, and this is {sys.platform}"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "a Python without the global lock has no limited API"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler ({compiler}, g++) on PATH"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"torch could not be imported while it was built ({error}); build it without isolation"
    return None


def headers() -> list[str]:
    """What every source may include."""
    return sorted(path for ending in ("h", "inc", "cuh") for path in glob.glob(f"csrc/**/*.{ending}", recursive=True))


def cpu_extension() -> object | None:
    """The extension tgdp_fast/_cpu, or None."""
    reason = obstacle("CPU")
    if reason is not None:
        return skip("CPU", reason)
    from torch.utils.cpp_extension import CppExtension

    flags = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
    # They are noise of the compiler about its own vector headers.
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
    if os.environ.get("TGDP_PORTABLE") == "1":
        flags.append("-DTGDP_PORTABLE")
    link = ["-fopenmp"]
    if SANITIZE:
        flags += ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        link += ["-fsanitize=address,undefined"]
    sources = ["csrc/bindings.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
    return CppExtension(
        "tgdp_fast._cpu",
        sources,
        depends=headers(),
        py_limited_api=True,
        extra_compile_args={"cxx": flags},
        extra_link_args=link,
    )


def cuda_extension() -> object | None:
    """The extension tgdp_fast/_cuda, or None."""
    reason = obstacle("CUDA")
    if reason is not None:
        return skip("CUDA", reason)
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if torch.version.cuda is None:
        return skip("CUDA", f"torch {torch.__version__} was built without CUDA")
    nvcc = os.path.join(CUDA_HOME or "", "bin", "nvcc")
    if not os.access(nvcc, os.X_OK):
        return skip("CUDA", "no CUDA toolkit: neither nvcc on PATH nor CUDA_HOME")
    release = re.search(r"release (\d+)", ask(nvcc, "--version"))
    if release is None or release[1] != torch.version.cuda.partition(".")[0]:
        found = "an unknown version" if release is None else release[1]
        return skip("CUDA", f"torch was built with CUDA {torch.version.cuda} and the toolkit ({nvcc}) is {found}")
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        known = set(re.findall(r"compute_(\d+)", ask(nvcc, "--list-gpu-arch")))
        wanted = [name for name in ARCHITECTURES if name.replace(".", "").rstrip("a") in known]
        if not wanted:
            return skip("CUDA", f"the toolkit ({nvcc}) knows none of the architectures {', '.join(ARCHITECTURES)}")
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(wanted) + "+PTX"
    sources = ["csrc/cuda_bindings.cpp", *sorted(glob.glob("csrc/cuda/*.cu"))]
    # Without characters that a shell would read.
    architectures = "_".join(re.split(r"[;\s]+", os.environ["TORCH_CUDA_ARCH_LIST"].strip()))
    flags = {
        "cxx": ["-O3", "-g0", "-fvisibility=hidden", f"-DGPU_ARCHITECTURES={architectures}"],
        "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden"],
    }
    return CUDAExtension("tgdp_fast._cuda", sources, depends=headers(), py_limited_api=True, extra_compile_args=flags)


@contextlib.contextmanager
def shortened_output() -> Iterator[None]:
    """In place of each command of ninja, its number and the source; never silent for longer than ten seconds."""
    sys.stdout.flush()
    output, (reading, writing), start = os.dup(1), os.pipe(), time.monotonic()
    os.dup2(writing, 1)
    os.close(writing)

    def write(text: str) -> None:
        os.write(output, text.encode(errors="replace"))

    def forward() -> None:
        with open(reading, "rb", buffering=0) as pipe:
            rest = b""
            while True:
                if not select.select([pipe], [], [], 10)[0]:
                    write(f"compiling, {time.monotonic() - start:.0f} s so far\n")
                    continue
                read = pipe.read(1 << 16)
                *lines, rest = (rest + read).split(b"\n")
                for line in [*lines, *([rest] if rest and not read else [])]:
                    text = line.decode(errors="replace")
                    command = re.match(r"(\[\d+/\d+\] ).* -c \S*?(csrc/\S+) ", text)
                    write((command[1] + command[2] if command else text) + "\n")
                if not read:
                    return

    thread = threading.Thread(target=forward)
    thread.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(output, 1)
        thread.join()
        os.close(output)


def ask(*command: str) -> str:
    """What a program prints; nothing if it fails."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def arguments() -> dict:
    """Arguments of setup() for what can be built."""
    if sys.argv[1:2] in (["egg_info"], ["dist_info"], ["sdist"]) and os.environ.get("TGDP_TAG") != "1":
        return {}  # They ask for names and files alone, and loading torch takes seconds.
    extensions = [extension for extension in (cpu_extension(), cuda_extension()) if extension is not None]
    if not extensions:
        return {"cmdclass": {"build_py": BuildPython}}
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """A build that reports what went wrong and leaves the rest of the installation alone."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # Setuptools' temporary folder would compile everything anew at each installation. ninja follows our own
            # headers, but not those of torch.
            self.build_temp = os.path.join("build", f"{sys.implementation.cache_tag}-torch{torch.__version__}")

        def run(self) -> None:
            in_sources = self.editable_mode or self.inplace
            if in_sources:
                # Of earlier versions, for one version of Python each.
                for path in glob.glob("tgdp_fast/_c*.cpython-*.so"):
                    os.remove(path)
            self.run_and_report()
            write_skipped("tgdp_fast" if in_sources else os.path.join(self.build_lib, "tgdp_fast"))

        def run_and_report(self) -> None:
            try:
                super().run()
            except Exception as error:
                # Something that is checked before any extension: CUDA's checks must not cost the others.
                cuda = [extension for extension in self.extensions if kind_of(extension) == "CUDA"]
                others = [extension for extension in self.extensions if extension not in cuda]
                for extension in cuda or others:
                    skip(kind_of(extension), f"the compiler failed: {error}")
                if cuda and others:
                    self.extensions = others
                    self.run_and_report()

        def build_extensions(self) -> None:
            with shortened_output():
                super().build_extensions()

        def build_extension(self, extension: object) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                skip(kind_of(extension), f"the compiler failed: {error}")

        def copy_extensions_to_source(self) -> None:
            """For editable installs, where a failed build has nothing to copy."""
            built = [e for e in self.extensions if os.path.isfile(self.get_ext_fullpath(e.name))]
            self.extensions = [e for e in self.extensions if e in built or self._is_built(e)]
            super().copy_extensions_to_source()

        def _is_built(self, extension: object) -> bool:
            filename = self.get_ext_filename(self.get_ext_fullname(extension.name))
            return os.path.isfile(os.path.join(self.build_lib, filename))

    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    if os.environ.get("TGDP_TAG") == "1":
        cuda = f".cu{torch.version.cuda.replace('.', '')}" if "CUDA" in map(kind_of, extensions) else ""
        options["egg_info"] = {"tag_build": f"+torch{'.'.join(torch.__version__.split('.')[:2])}{cuda}"}
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build, "build_py": BuildPython}, "options": options}


def packages() -> list[str]:
    """Every package. The kernels have no __init__.py, so that the folder at the top of a checkout hides no package of
    that name; a checkout without symbolic links has a text file in their place, and is installed without them.
    """
    kernels = ["tgdp_fast.kernels"] * os.path.isdir("tgdp_fast/kernels")
    return [*find_packages(include=["tgdp_fast", "tgdp_fast.*"]), *kernels]


setup(packages=packages(), **arguments())
