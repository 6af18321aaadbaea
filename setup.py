"""Builds the compiled library, hf_linattn/_kernels.so, where nvcc is found, and puts `convert` and `recipes` below hf_linattn in a wheel;
everything else about the package stands in pyproject.toml.

`pip install .` builds the library on the way; `python setup.py build_kernels` builds it into a checkout. It has a C interface and no torch
headers, so one wheel serves every Python and every torch. Environment: HF_LINATTN_REQUIRE_CUDA=1 makes a missing nvcc an error,
HF_LINATTN_REQUIRE_CUDA=0 leaves the library out, HF_LINATTN_CAPABILITIES="9.0" builds for cards of that compute capability alone,
MAX_JOBS sets the number of compilers that run at once, NVCC names the compiler.

At the top of site-packages the names `convert` and `recipes` would stand in everybody's way. A checkout has them at its top all the same,
for `python -m convert.linearize` and `accelerate launch -m recipes...`, from where no relative import leads from one to the other; so the
imports among them become relative on their way into a wheel.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, Distribution, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "kernels"
OBJECTS = ROOT / "build" / "kernels"
LIBRARY = "_kernels.so"
ARCHITECTURES = "sm_80 compute_80 sm_90a"  # compute_80 is the code that drivers translate for cards to come
FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC"]
BELOW = ("convert", "recipes")


def find_nvcc() -> str | None:
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for candidate in (os.environ.get("NVCC"), shutil.which("nvcc"), os.path.join(toolkit, "bin", "nvcc")):
        if candidate and shutil.which(candidate):
            return candidate
    return None


def architectures_of(source: Path) -> str:
    """A source may name the targets it is for in a first line, as `// architectures: sm_90a`; one without kernels names a single one.

    Of these, those of the compute capabilities that were asked for; all of them where none is.
    """
    named = re.match(r"// architectures: (.+)", source.read_text().split("\n", 1)[0])
    every = named[1].split() if named else ARCHITECTURES.split()
    asked = os.environ.get("HF_LINATTN_CAPABILITIES", "").replace(".", "").split()
    return " ".join([name for name in every if name.removeprefix("sm_").rstrip("a") in asked] or every)


def instances() -> dict[str, str]:
    """The sources that `kernels/instances.txt` stands for, by file name."""
    made = {}
    for line in (SOURCES / "instances.txt").read_text().splitlines():
        if not line.startswith("#"):
            engine, dtype, head_dim, *named = line.split()
            head = f"// architectures: {' '.join(named)}\n" if named else ""
            body = f"namespace linattn_{engine} {{\nLINATTN_{engine.upper()}_INSTANTIATE({dtype}, {head_dim})\n}}\n"
            made[f"{engine}_{dtype.strip('_')}_{head_dim}.cu"] = f'{head}#include "{engine}/launch.cuh"\n{body}'
    return made


def all_sources() -> list[Path]:
    """Every source that is compiled; those of the instances are written into the build first."""
    folder = OBJECTS / "instances"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in instances().items():
        (folder / name).write_text(text)
    return sorted([*SOURCES.rglob("*.cu"), *(folder / name for name in instances())])


def text_with_headers(source: Path, seen: set[Path] | None = None) -> bytes:
    """The source and all headers of ours that it includes, one after the other."""
    seen = set() if seen is None else seen
    seen.add(source)
    text = source.read_bytes()
    headers = [SOURCES / name.decode() for name in re.findall(rb'#include "([^"]+)"', text)]
    return text + b"".join(text_with_headers(header, seen) for header in headers if header not in seen)


def targets(architectures: str) -> list[str]:
    """One -gencode for each version of the code generator, since each is a pass of its own over the source.

    What is for one card alone (sm_90a) has its own; code for all cards of a kind (sm_90) is made of the oldest's.
    """
    codes: dict[str, list[str]] = {}
    for name in architectures.split():
        version = name.split("_")[1]
        codes.setdefault(version if version.endswith("a") else "80", []).append(name)
    return [f"-gencode=arch=compute_{version},code=[{','.join(names)}]" for version, names in codes.items()]


def build_library(target: Path) -> None:
    """Compile all sources and link them. An object is kept under a name made of all that went into it, so none is ever stale."""
    nvcc = find_nvcc()
    assert nvcc is not None
    sources = all_sources()
    everything = " ".join(dict.fromkeys(name for source in sources for name in architectures_of(source).split()))
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True).stdout

    def command_for(source: Path) -> tuple[list[str], Path]:
        flags = [*FLAGS, "-Ikernels", *targets(architectures_of(source))]
        if source.name == "plan.cu":
            flags.append(f'-DLINATTN_ARCHITECTURES="{everything}"')
        digest = hashlib.sha256(version + " ".join(flags).encode() + text_with_headers(source))
        folder = "" if source.parent in (SOURCES, OBJECTS / "instances") else f"{source.parent.name}_"
        made = OBJECTS / f"{folder}{source.stem}-{digest.hexdigest()[:16]}.o"
        return [nvcc, *flags, "-c", str(source), "-o"], made

    def compile_one(source: Path) -> Path:
        command, made = command_for(source)
        if not made.exists():
            aside = made.with_suffix(f".{os.getpid()}.o")
            print(" ".join([*command, str(made)]), flush=True)
            done = subprocess.run([*command, str(aside)], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"nvcc could not compile {source.name}:\n{done.stdout}{done.stderr}")
            aside.replace(made)
        return made

    jobs = int(os.environ.get("MAX_JOBS") or min(os.cpu_count() or 1, 16))
    largest_first = sorted(sources, key=lambda source: -len(text_with_headers(source)))
    with ThreadPoolExecutor(jobs) as pool:
        objects = sorted(pool.map(compile_one, largest_first))
    for old in set(OBJECTS.glob("*.o")) - set(objects):
        old.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(f".{os.getpid()}")
    subprocess.run([nvcc, "-shared", "-cudart", "static", *map(str, objects), "-o", str(aside)], check=True)
    aside.replace(target)
    print(f"hf_linattn: built {target} for {everything} ({target.stat().st_size / 1e6:.1f} MB)", flush=True)


def library_is_wanted() -> bool:
    """Whether to build; says loudly why not."""
    wish = os.environ.get("HF_LINATTN_REQUIRE_CUDA", "")
    if wish == "0":
        return False
    if find_nvcc():
        return True
    cause = "hf_linattn: nvcc, the CUDA compiler, was not found (looked at $NVCC, the PATH and $CUDA_HOME/bin)"
    if wish:
        raise SystemExit(f"{cause}, and HF_LINATTN_REQUIRE_CUDA={wish} asks for the compiled library: install the CUDA toolkit.")
    bar = "*" * 80
    effect = "This installation is pure Python: on a GPU it runs the slower PyTorch form."
    print(f"{bar}\n{cause}.\n{effect}\nInstall the CUDA toolkit and install again.\n{bar}", file=sys.stderr, flush=True)
    return False


def relative_imports(text: str, package: str) -> str:
    """The text of a module of `package`, below hf_linattn, with its imports of `convert` and `recipes` made relative."""
    up = "." * len(package.split("."))
    return re.sub(rf"^(\s*from )(?=(?:{'|'.join(BELOW)})[. ])", rf"\1{up}", text, flags=re.MULTILINE)


class BuildWheel(build_py):
    def run(self) -> None:
        target = ROOT / "hf_linattn" / LIBRARY if self.editable_mode else Path(self.build_lib) / "hf_linattn" / LIBRARY
        wanted = library_is_wanted()
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # it may hold modules that are no more
            found = find_namespace_packages(str(ROOT), include=[f"{name}*" for name in BELOW])
            self.packages = [*self.packages, *(f"hf_linattn.{name}" for name in found)]
            self.package_dir = {**self.package_dir, **{f"hf_linattn.{name}": name for name in BELOW}}
        super().run()
        if not self.editable_mode:
            target.unlink(missing_ok=True)  # what lies in a checkout may be of other sources
        if wanted:
            build_library(target)

    def build_module(self, module: str, module_file: str, package: str) -> None:
        super().build_module(module, module_file, package)
        if package.startswith(tuple(f"hf_linattn.{name}" for name in BELOW)):
            made = Path(self.get_module_outfile(self.build_lib, package.split("."), module))
            made.write_text(relative_imports(made.read_text(encoding="utf-8"), package), encoding="utf-8")


class BuildKernels(Command):
    description = "build the compiled library into the checkout"
    user_options: list[tuple[str, str | None, str]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        if library_is_wanted():
            build_library(ROOT / "hf_linattn" / LIBRARY)


class MaybeCompiled(Distribution):
    def has_ext_modules(self) -> bool:
        return os.environ.get("HF_LINATTN_REQUIRE_CUDA", "") != "0" and find_nvcc() is not None


class WheelForEveryPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"build_py": BuildWheel, "build_kernels": BuildKernels, "bdist_wheel": WheelForEveryPython}, distclass=MaybeCompiled)
