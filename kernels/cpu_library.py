"""The C kernels of the CPU path: compiled once with the machine's own compiler, then loaded.

PyTorch has no gather of rows with a product that does not copy them first. Where no compiler is
found, or ``GNOMON_CPU_KERNELS=0``, callers stay with PyTorch operators.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = tuple(
    Path(__file__).with_name(f"cpu_{name}.c") for name in ("gather", "attention", "sketch")
)
HEADER = Path(__file__).with_name("cpu_vector.h")
# OpenMP resolves to the libgomp that PyTorch has loaded, so that both share one pool of threads.
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared")
_log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels; compiled on first use on a machine, None where that is impossible."""
    if os.environ.get("GNOMON_CPU_KERNELS") == "0":
        return None
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None or not HEADER.exists():
        _log.info("no C compiler: the CPU path stays with PyTorch's operators")
        return None
    try:
        return _declared(ctypes.CDLL(str(_built(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("the C kernels do not build here, PyTorch's operators serve: %s", error)
        return None


def _built(compiler: str) -> Path:
    """Path of the shared object for this source, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    sources = [path.read_bytes() for path in (HEADER, *SOURCES)]
    facts = (*sources, compiler.encode(), version, _processor().encode())
    name = hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]
    folder = _folder()
    target = folder / f"cpu-{name}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "cpu.so"
            _compile(compiler, made)
            made.replace(target)
    return target


def _compile(compiler: str, target: Path) -> None:
    """With OpenMP if the compiler has it, else for one thread."""
    for threads in (("-fopenmp",), ()):
        command = [compiler, *FLAGS, *threads, "-o", str(target), *map(str, SOURCES), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode == 0:
            return
    raise OSError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def _processor() -> str:
    """What the compiler's ``native`` depends on: homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    keys = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(keys)}))


def _folder() -> Path:
    if root := os.environ.get("GNOMON_CACHE"):
        return Path(root).expanduser() / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gnomon" / "kernels"


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    lib.gnomon_rows.argtypes = [pointer] * 12 + [number] * 11 + [ctypes.c_double]
    lib.gnomon_columns.argtypes = [pointer] * 8 + [number] * 9
    lib.gnomon_attention.argtypes = [pointer] * 15 + [number] * 13 + [ctypes.c_double] * 3
    lib.gnomon_sketch.argtypes = [pointer] * 11 + [number] * 7 + [ctypes.c_double]
    lib.gnomon_sketched.argtypes = [pointer] * 19 + [number] * 8 + [ctypes.c_double]
    lib.gnomon_sketch.restype = lib.gnomon_sketched.restype = None
    lib.gnomon_norm.argtypes = [pointer] * 5 + [number] * 3 + [ctypes.c_double]
    lib.gnomon_norm.restype = None
    lib.gnomon_passing.argtypes = [pointer, ctypes.c_double, number, pointer]
    for function in (
        lib.gnomon_passing,
        lib.gnomon_rows,
        lib.gnomon_columns,
        lib.gnomon_attention,
        lib.gnomon_has_fp16,
    ):
        function.restype = number
    return lib
