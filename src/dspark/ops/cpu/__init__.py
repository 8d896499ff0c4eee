"""Builds and loads the CPU kernels: once per machine, source and torch version, kept in the user's cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("kernels.cpp")
_library: list[ctypes.CDLL] = []
DTYPES = (torch.float32, torch.bfloat16)  # of logits and weights that the kernels read
FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20", "-shared", "-fPIC", "-fno-math-errno")


def cache_directory() -> Path:
    """Where compiled code is kept between runs: $DSPARK_CACHE, else the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DSPARK_CACHE") or Path(home) / "dspark")


def machine_key() -> str:
    """Changes with what compiled code depends on: the processor's features and the torch build."""
    features = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        features = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Feat"))), "")
    return hashlib.sha256(f"{platform.machine()} {features} {torch.__version__}".encode()).hexdigest()[:16]


@functools.cache
def load_kernels() -> bool:
    """Register the C++ ops as torch.ops.dspark.*; False (and one warning) where they cannot be built."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        log.warning("no C++ compiler found: matrix products fall back to torch; install g++ for the fast CPU path")
        return False
    parts = b"".join(path.read_bytes() for path in sorted(SOURCE.parent.glob("*.h")))
    key = hashlib.sha256(SOURCE.read_bytes() + parts + " ".join(FLAGS).encode()).hexdigest()[:16]
    library = cache_directory() / f"kernels-{key}-{machine_key()}.so"
    try:
        if not library.is_file():
            _build(compiler, library)
        _library.append(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))  # global: compiled graphs call into it
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.warning("CPU kernels could not be built, falling back to torch: %s", detail.strip().splitlines()[:1])
        return False
    from dspark.ops.cpu import fakes  # noqa: F401  shapes for tracing, once the ops exist

    return True


def has_kernel(x: torch.Tensor, dtypes: Sequence[torch.dtype] = DTYPES) -> bool:
    """Whether a kernel takes this tensor; else its plain twin does."""
    return x.device.type == "cpu" and x.dtype in dtypes and load_kernels()


@contextlib.contextmanager
def serial_glue() -> Iterator[None]:
    """Inside, only our own kernels use several threads: for few rows, everything else is shorter than a barrier."""
    _library[0].dspark_serial_glue(1)
    try:
        yield
    finally:
        _library[0].dspark_serial_glue(0)


def _build(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    log.info("building the CPU kernels once for this machine (10-20 s)")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch, library.name)
        command = [compiler, *FLAGS, f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include", str(SOURCE)]
        command += ["-o", str(made), f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        made.replace(library)
