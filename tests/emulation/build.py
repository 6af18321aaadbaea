"""Builds the kernels as libraries for the CPU: the sources of `kernels/` with launches made calls of the emulator, and with
`instructions.cuh`, `warpgroup.cuh` and `bulk.cuh` in place of the PTX. One is the code of sm_80 throughout; the other has beside it what is
for Hopper alone, and says that its card is one."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
# where they stand in for what is in kernels/
OURS = ("emulator.h", "tile/instructions.cuh", "tile/warpgroup.cuh", "tile/bulk.cuh", "tile/exact.cuh", "runtime.cpp")
FLAGS = ["-std=c++20", "-O1", "-w", "-fPIC", "-pthread"]  # -w: the pragmas are nvcc's
HOPPER = "-D__CUDA_ARCH_FEAT_SM90_ALL"


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def headers() -> Path | None:
    """CUDA's headers: of the toolkit that nvcc belongs to."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    return next((folder for folder in (*folders, Path("/usr/local/cuda/include")) if (folder / "cuda_bf16.h").exists()), None)


def matching(text: str, start: int, opening: str, closing: str) -> int:
    """Where the bracket opened at `start` is closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == opening) - (text[i] == closing)
        if depth == 0:
            return i
    raise ValueError(f"unbalanced {opening} at {start}")


def arguments(text: str) -> list[str]:
    """The parts of an argument list, split at the commas outside all brackets."""
    parts, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    return [*parts, text[begin:]]


def translated(text: str) -> str:
    """kernel<T><<<grid, threads, shared, stream>>>(x) becomes a call of the emulator, dynamic shared memory the emulator's."""
    text = text.replace("__noinline__", "")
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+(?: \w+)?) shared\[\];",
        r"\1 *const shared = reinterpret_cast<\1 *>(emulation::shared_memory);",
        text,
    )
    while (at := text.find("<<<")) >= 0:
        name = re.search(r"\w+(<[^;{}()]*>)?$", text[:at])
        assert name, text[at - 80 : at]
        close = text.index(">>>(", at)
        end = matching(text, close + 3, "(", ")")
        grid, threads, *_ = arguments(text[at + 3 : close])
        call = f"{name[0]}({text[close + 4 : end]});"
        text = text[: name.start()] + f"emulation::launch(dim3({grid}), {threads}, [&] {{ {call} }})" + text[end + 1 :]
    return text


def with_headers(source: Path, root: Path, seen: frozenset[Path] = frozenset()) -> bytes:
    """The text of a source and of all headers of ours that it includes."""
    text, seen = source.read_bytes(), seen | {source}
    found = [root / name.decode() for name in re.findall(rb'#include "([^"]+)"', text)]
    return text + b"".join(with_headers(header, root, seen) for header in found if header not in seen)


def compile_library(sources: list[Path], library: Path, root: Path, kept: Path | None = None, of_hopper: list[Path] | None = None) -> None:
    """Objects stay in the folder `kept`, under a name made of all that went into them. Raises RuntimeError with the compiler's words."""
    of_hopper = of_hopper or []

    def run(*command: object) -> None:
        done = subprocess.run([compiler(), *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])

    def compiled(source: Path) -> Path:
        flags = [*FLAGS, *([HOPPER] if source in of_hopper else [])]
        digest = hashlib.sha256(" ".join(flags).encode() + with_headers(source, root))
        made = (kept or root) / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not made.exists():
            run(*flags, f"-I{headers()}", f"-I{root}", "-c", source, "-o", aside := made.with_suffix(".partial"))
            aside.replace(made)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*sources, *of_hopper]))
    run("-shared", "-pthread", *objects, "-o", library)


def build(folder: Path, hopper: bool = False) -> Path:
    """All kernels as `folder`/emulated.so, or with Hopper's own as emulated_hopper.so, made where it is not there yet."""
    library = folder / ("emulated_hopper.so" if hopper else "emulated.so")
    if library.exists():
        return library
    sources, of_hopper = [], []
    for name, text in kernel_sources().items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".cu":
            target = target.with_suffix(".cpp")
            (of_hopper if is_of_hopper(text) else sources).append(target)
        target.write_text(('#include "emulator.h"\n' if target.suffix == ".cpp" else "") + translated(text))
    for name in OURS:
        shutil.copy(HERE / name.rpartition("/")[2], folder / name)
    kept = folder.parent / "emulated-objects"
    kept.mkdir(exist_ok=True)
    (of_hopper if hopper else sources).append(folder / "runtime.cpp")
    compile_library(sources, aside := library.with_suffix(".partial"), folder, kept, of_hopper if hopper else [])
    return aside.replace(library)


def is_of_hopper(text: str) -> bool:
    """A source for Hopper alone."""
    return text.startswith("// architectures: sm_90a")


def kernel_sources() -> dict[str, str]:
    """What is emulated, by its path below kernels/; the sources of the instances among them."""
    files = [path for path in sorted(KERNELS.rglob("*.*")) if path.suffix in (".cu", ".cuh", ".h")]
    found = {str(path.relative_to(KERNELS)): path.read_text() for path in files} | instances()
    return {name: text for name, text in found.items() if name not in OURS}


def instances() -> dict[str, str]:
    """As setup.py makes them."""
    specification = importlib.util.spec_from_file_location("setup_of_linattn", KERNELS.parent / "setup.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    with mock.patch("setuptools.setup"):
        specification.loader.exec_module(module)
    return module.instances()


def digest() -> str:
    """Of all that the libraries are made of."""
    texts = [f"{name}\n{text}".encode() for name, text in kernel_sources().items()]
    parts = [*texts, *((HERE / name.rpartition("/")[2]).read_bytes() for name in OURS), Path(__file__).read_bytes()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
