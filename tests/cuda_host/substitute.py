"""Build the substitute CUDA runtime, or run a command on it.

    python substitute.py FOLDER                 build it there; print the libraries
    python substitute.py FOLDER -- COMMAND...   build it there if need be, run COMMAND on it

It needs gcc and nm, a build of torch for CUDA 12 or 13, and the headers that torch's
packages bring (``nvidia-cuda-runtime``) and do not bring (``nvidia-cuda-crt``, for CUDA 12
``nvidia-cuda-nvcc-cu12``).
``runtime/host.h`` says what is real on it, and its settings.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

_SOURCES: Final = Path(__file__).with_name("runtime")
_CUDA: Final = ("state", "device", "memory", "streams", "kernels", "entry_points")
#: torch's libraries that ask for CUDA's functions.
_ASKING: Final = ("c10_cuda", "torch_cuda", "torch_cuda_linalg", "torch_python")
_FLAGS: Final = (
    "-O1",
    "-g",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
)
#: The code of "not supported", of the runtime and of the driver.
#: Source: ``cudaErrorNotSupported``, ``CUDA_ERROR_NOT_SUPPORTED``.
_NOT_SUPPORTED: Final = 801
#: Of cuBLAS, "success". Source: ``CUBLAS_STATUS_SUCCESS``.
_CUBLAS_SUCCESS: Final = 0


def build(folder: Path) -> list[Path]:
    """Build the libraries and return them, in the order in which to preload them.

    Args:
        folder: Where; what is there already and newer than its sources is kept.

    Raises:
        SystemExit: What is needed is not installed.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise SystemExit("torch is not installed")
    libraries = Path(torch.origin).with_name("lib")
    if not (libraries / "libtorch_cuda.so").is_file():
        raise SystemExit(
            "this torch is built without CUDA; install a CUDA build, as PyPI has it"
        )
    version, headers = _headers(Path(torch.origin).parents[1] / "nvidia")
    folder.mkdir(parents=True, exist_ok=True)
    cuda = folder / "libcuda.so.1"
    nvml = folder / "libnvidia-ml.so.1"
    nvrtc = folder / f"libnvrtc.so.{version}"
    sources = [_SOURCES / f"{name}.c" for name in _CUDA]
    newest = max(each.stat().st_mtime for each in (*_SOURCES.iterdir(), Path(__file__)))
    if not (nvml.is_file() and nvml.stat().st_mtime > newest):
        rest = folder / "rest.c"
        rest.write_text(_rest(libraries, sources), encoding="utf-8")
        _compile(cuda, [*sources, rest], headers, "-lpthread", "-ldl")
        _compile(nvrtc, [_SOURCES / "nvrtc.c"], headers)
        _compile(nvml, [_SOURCES / "nvml.c"], headers, str(cuda))
    return [cuda, nvml, nvrtc]


def _headers(packages: Path) -> tuple[int, list[Path]]:
    """Return CUDA's version, and the folders of its headers in NVIDIA's packages.

    Raises:
        SystemExit: They are not installed.
    """
    folders = {13: ["cu13/include"], 12: ["cuda_runtime/include", "cuda_nvcc/include"]}
    for version, names in folders.items():
        found = [packages / each for each in names]
        if (found[-1] / "crt" / "host_config.h").is_file():
            return version, found
    raise SystemExit(
        f"CUDA's headers are not in {packages}; pip install nvidia-cuda-crt==13.0.*, or "
        "nvidia-cuda-nvcc-cu12==12.8.* for a torch of CUDA 12.8"
    )


def _rest(libraries: Path, sources: list[Path]) -> str:
    """Return C for what torch asks for and the sources do not define."""
    text = "".join(each.read_text(encoding="utf-8") for each in sources)
    defined = set(re.findall(r"^EXPORT [^;{(]*?\b(\w+)\(", text, re.MULTILINE))
    asked: set[str] = set()
    for name in _ASKING:
        listing = subprocess.run(
            ["nm", "-D", "--undefined-only", libraries / f"lib{name}.so"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        asked |= set(re.findall(r" U (_*cu(?:da|blas|[A-Z])\w*)", listing))
    # The header defines some names as their second version.
    missing = {
        name
        for name in asked
        if name not in defined and name.removesuffix("_v2") not in defined
    }
    lines = ["// What nothing else defines; see substitute.py."]
    for name in sorted(missing):
        code = _CUBLAS_SUCCESS if name.startswith("cublas") else _NOT_SUPPORTED
        if not name.startswith("cuFile"):
            lines.append(f"int {name}(void);")
            lines.append(
                f'__attribute__((visibility("default"))) int {name}(void) '
                f"{{ return {code}; }}"
            )
    return "\n".join(lines) + "\n"


def _compile(
    library: Path, sources: list[Path], headers: list[Path], *more: str
) -> None:
    name = f"-Wl,-soname,{library.name}"
    include = [f"-isystem{each}" for each in headers] + ["-I", str(_SOURCES)]
    subprocess.run(
        ["gcc", *_FLAGS, name, *include, "-o", library, *sources, *more], check=True
    )


def environment(folder: Path) -> dict[str, str]:
    """Return the environment in which a program runs on the substitute."""
    preload = [str(each.resolve()) for each in build(folder)]
    # Kernels that torch would keep from run to run are empty here.
    settings = {"LD_PRELOAD": " ".join(preload), "USE_PYTORCH_KERNEL_CACHE": "0"}
    return os.environ | settings


def main(arguments: list[str]) -> None:
    """Build, and run a command if one is given."""
    folder = Path(arguments[0])
    if arguments[1:2] == ["--"]:
        command = arguments[2:]
        os.execvpe(command[0], command, environment(folder))  # noqa: S606  # as it is
    print(*build(folder), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
