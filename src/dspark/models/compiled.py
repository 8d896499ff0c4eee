"""Runs a module eagerly at once and swaps something faster in when that is ready: a kernel, or its compiled graph.

Compiled graphs are cached on disk. One serves every batch: matrix products and attention are opaque kernels that take
any number of rows, so Inductor only fuses the glue between them, with symbolic sizes. Weights stay where they are:
the graph borrows them.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dspark.models.fusion import merge_linears
from dspark.ops.cpu import cache_directory, load_kernels, machine_key, serial_glue

log = logging.getLogger(__name__)
SHIMS = {
    "linear": "H x, H w, H* b, int64_t n, H* out",
    "linear2": "H x, H w0, H* b0, int64_t n0, H w1, H* b1, int64_t n1, H* out0, H* out1",
    "linear3": "H x, H w0, H* b0, int64_t n0, H w1, H* b1, int64_t n1, H w2, H* b2, int64_t n2, "
    "H* out0, H* out1, H* out2",
    "store": "H k, H v, H pool_k, H pool_v, H slots, H* none = nullptr",  # some versions pass a result even here
    "ragged_attention": "H q, H k, H v, H pool_k, H pool_v, H table, H cu, H context, int64_t page_size, double scale, "
    "int32_t causal, int64_t window, double softcap, H* out",
}
FEW_ROWS = 16  # up to here a graph's loops between the products run on one thread
Forward = Callable[..., Sequence[Tensor]]
PAUSE = 2.0  # seconds after the last trace before compiling begins


class _Turns:
    """Torch's tracers serve one thread of a process at a time, and compiling traces too.

    Compiling waits until nobody has traced for a while, so that all forwards of an engine are traced before the first
    of them is compiled: else the second would be traced half a minute later.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.traced = 0.0

    @contextmanager
    def tracing(self) -> Iterator[None]:
        with self.lock:
            yield
            self.traced = time.monotonic()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        while time.monotonic() - self.traced < PAUSE:
            time.sleep(0.1)
        with self.lock:
            yield


_turns = _Turns()


class SwappableGraph:
    """`module` as a function of flat tensors, compiled once per machine; every first dimension may vary by call."""

    def __init__(self, module: nn.Module, identity: str, native: Callable[[], Forward | None] | None = None):
        """`identity` says what the graph depends on beside code and machine: configuration, dtype, taps, page size.

        `native` makes the module's forward out of kernels, where there are such for it: nothing needs compiling then.
        """
        self.module = module
        self.key = _key(identity)
        self.status = "eager"  # then compiling, then compiled or failed
        self._run: Forward = module
        self._native = native
        self.native = False  # whether kernels run it, rather than a compiled graph or the module
        self._thread: threading.Thread | None = None

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """The module's outputs as a flat sequence."""
        return self._run(*tensors)

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, example: Sequence[Tensor]) -> None:
        """Load the cached graph or compile in the background. `example` has no size 1 in a dimension that varies.

        A graph whose outputs on the example differ from the module's own is refused (status `failed`, eager goes on).
        """
        if not load_kernels() or self.status != "eager":
            return
        want = _results(self.module, example)
        if self._native is not None and (run := self._native()) is not None:
            self._take(run, example, want)
            self.native = True
            return
        path = cache_directory() / f"graph-{self.key}.pt2"
        if path.is_file():
            self._adopt(path, example, want)
            return
        try:
            with _turns.tracing():
                program = _trace(self.module, example)
        except Exception as error:  # a family the tracer cannot follow runs eagerly: slower, never wrong
            self._fail(error)
            return
        self.status = "compiling"
        # not a daemon: Python cannot end such a thread inside C++ without aborting, and what is done is cached
        self._thread = threading.Thread(target=self._compile, args=(program, path, example, want))
        self._thread.start()

    def wait(self, tick: Callable[[float], None] | None = None) -> None:
        """Block until compiling has ended; `tick` gets the seconds waited, about ten times a second."""
        start = time.monotonic()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.1)
            if tick is not None:
                tick(time.monotonic() - start)

    def _compile(self, program: Any, path: Path, example: Sequence[Tensor], want: Sequence[Tensor]) -> None:
        try:
            with _turns.compiling(), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _compile_to(program, path)
                self._adopt(path, example, want)
        except Exception as error:  # the eager module keeps serving
            self._fail(error)

    def _adopt(self, path: Path, example: Sequence[Tensor], want: Sequence[Tensor]) -> None:
        try:
            compiled = torch._inductor.aoti_load_package(str(path))
            traced = _Flat(self.module)
            weights: dict[str, Tensor] = dict(traced.named_buffers(remove_duplicate=False))
            weights.update(traced.named_parameters(remove_duplicate=False))
            names = compiled.get_constant_fqns()
            compiled.load_constants({name: weights[name] for name in names}, check_full_update=True, user_managed=True)
            self._take(_with_serial_glue(compiled.loader.boxed_run), example, want)
        except Exception as error:  # e.g. a cache written by another build: compile anew next time
            path.unlink(missing_ok=True)
            self._fail(error)

    def _take(self, run: Forward, example: Sequence[Tensor], want: Sequence[Tensor]) -> None:
        """Go on with `run`; raises RuntimeError where it is not the module's function."""
        for got, wanted in zip(_results(run, example), want, strict=True):
            _check_close(got, wanted)
        self._run, self.status = run, "compiled"

    def _fail(self, error: Exception) -> None:
        self.status = "failed"
        log.warning("running %s eagerly, no compiled graph: %s", type(self.module).__name__, str(error).split("\n")[0])


def _with_serial_glue(run: Callable[[list[Tensor]], Sequence[Tensor]]) -> Forward:
    def forward(*tensors: Tensor) -> Sequence[Tensor]:
        if len(tensors[0]) > FEW_ROWS:
            return run(list(tensors))
        with serial_glue():
            return run(list(tensors))

    return forward


def _results(function: Callable[..., Sequence[Tensor]], example: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and what was written into the inputs."""
    inputs = [tensor.clone() for tensor in example]
    outputs = [tensor.clone() for tensor in function(*inputs)]
    return outputs + inputs


def _key(identity: str) -> str:
    digest = hashlib.sha256(f"{identity} {machine_key()} {transformers.__version__}".encode())
    package = Path(__file__).parents[1]
    for path in sorted([*package.glob("models/*.py"), *package.glob("ops/*.py"), *package.glob("ops/cpu/*")]):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _trace(module: nn.Module, example: Sequence[Tensor]) -> Any:
    dynamic = tuple(
        {d: torch.export.Dim.DYNAMIC for d in range(x.dim()) if d == 0 or x.dtype == torch.int32} for x in example
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = tuple(x.clone() for x in example)  # a tensor given twice would become one input of the graph
        program = torch.export.export(_Flat(module), inputs, dynamic_shapes=(dynamic,), strict=False)
    merge_linears(program.graph_module)
    return program


class _Flat(nn.Module):
    """Gives the exporter one signature, whatever the number of tensors."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.module(*tensors))


def _compile_to(program: Any, path: Path) -> None:
    ops = torch.ops.dspark
    shims = {
        getattr(ops, name).default: [
            f"AOTITorchError aoti_torch_cpu_{name}({arguments.replace('H', 'AtenTensorHandle')})"
        ]
        for name, arguments in SHIMS.items()
    }
    options = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.custom_ops_to_c_shims": shims,
        # what several readers need is made once: left alone, every layer computes the rotation's cosines again
        "realize_opcount_threshold": 4,
        "realize_reads_threshold": 1,
        # round where the module rounds: else bits depend on what is fused, and taps would change the logits
        "emulate_precision_casts": True,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(scratch, path.name)), inductor_configs=options
        )
        Path(made).replace(path)


def _check_close(got: Tensor, want: Tensor) -> None:
    tolerance = {torch.float32: 1e-3}.get(want.dtype, 1e-1)
    error = (got.float() - want.float()).abs().max().item() / max(want.float().abs().max().item(), 1e-6)
    if not error <= tolerance:
        raise RuntimeError(f"the compiled graph is off by {error:.2g} of the largest value (allowed {tolerance})")
