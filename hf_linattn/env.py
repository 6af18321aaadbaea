"""`python -m hf_linattn.env`: what was found on this machine, which form of linear attention will run on it, and why."""

import ctypes
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .ops import cuda


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def _driver() -> str:
    try:
        found = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return "none found"
    return f"supports CUDA {found.value // 1000}.{found.value % 1000 // 10}"


def _verdict(cause: str) -> str:
    """Which form runs, as one sentence."""
    try:
        wish = cuda.backend()
    except ValueError as error:
        return f"none: {error}"
    if wish == "torch":
        return "PyTorch on every device, because HF_LINATTN_BACKEND=torch asks for it"
    if not cause:
        return "the compiled kernels on CUDA tensors (float32, float16, bfloat16; head dimensions up to 256), PyTorch on others"
    if wish == "cuda":
        return f"none on CUDA tensors: HF_LINATTN_BACKEND=cuda asks for the kernels, but {cause}"
    return f"PyTorch on every device, because {cause}"


def report() -> list[tuple[str, str]]:
    """Names and values, in the order in which they are printed."""
    library, cause = cuda.load_library()
    rows = [
        ("hf_linattn", _version("hf_linattn")),
        ("Python", platform.python_version()),
        ("PyTorch", torch.__version__),
        ("Transformers", _version("transformers")),
        ("CUDA of PyTorch", torch.version.cuda or "none"),
        ("driver", _driver()),
    ]
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(devices):
        major, minor = torch.cuda.get_device_capability(index)
        rows.append((f"GPU {index}", f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"))
    if not devices:
        rows.append(("GPU", "none found"))
    cause = cause if devices else cause.removesuffix(f": {cuda.CURE}")  # nobody is told to build kernels that no GPU here could run
    rows += [
        ("library", f"{cuda.LIBRARY} ({cuda.LIBRARY.stat().st_size / 1e6:.1f} MB)" if library else cause),
        ("architectures", cuda.architectures() or "none"),
    ]
    if devices and library:
        rows += [(f"kernels on GPU {index}", kernels) for index in range(devices) for kernels in [_kernels(index)]]
    rows.append(("runs", _verdict(_why_not(devices, bool(library)))))
    return rows


def _why_not(devices: int, library: bool) -> str:
    """Why the kernels do not run, or "" where they do. What the row of the library tells is not told again."""
    if not torch.version.cuda:
        return "this PyTorch is not built for CUDA; if there is a GPU here, install a CUDA build of it"
    if not devices:
        return "PyTorch finds no usable GPU; if there is one here, check its driver with `nvidia-smi`"
    return cuda.cannot_run() if library else "the library is missing, as told above"


def _kernels(index: int) -> str:
    """Which kernels take a plain causal call, by dtype."""
    words = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(1, 1, 64, 64, device=f"cuda:{index}", dtype=dtype)
        forward, backward = cuda.plans(x, x, x)
        words.append(f"{str(dtype).removeprefix('torch.')}: forward {forward}, backward {backward}")
    return "; ".join(words)


def main() -> None:
    rows = report()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


if __name__ == "__main__":
    main()
