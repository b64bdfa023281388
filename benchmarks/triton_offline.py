"""What the compiler makes of the Triton kernels, without a GPU: ``python -m benchmarks.triton_offline``.

Launches are recorded instead of made, with the tiles that `mobilenet_fast.triton_kernels.tiles` chooses for layers of
the family on a chip of each architecture, and compiled to machine code. The table shows what a kernel's speed depends
on and a compiler can say: the widest loads and stores of global memory, and for each architecture a program's registers
a thread, shared memory, how many warps of such programs a multiprocessor holds, and spills where there are any.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mobilenet_fast import triton_kernels
from mobilenet_fast.triton_kernels import tiles

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
CHIPS = {80: tiles.A100, 90: tiles.H100, 100: tiles.B200}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: its arguments and options, by name."""

    kernel: JITFunction
    arguments: dict
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.__module__.rpartition(".")[2] + self.kernel.__name__

    def without_memory(self) -> Launch:
        """With empty tensors: compiling asks for no more than their dtype, as all of them are aligned."""
        arguments = {
            name: torch.empty(0, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
            for name, value in self.arguments.items()
        }
        return Launch(self.kernel, arguments, self.options)


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one chip. Loads and stores are of global memory, in bytes a thread: the widest of them."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    load_bytes: int
    store_bytes: int
    instructions: int | None = None
    """In the program's code, which a program without loops issues once each; None if they were not counted."""

    def resident_warps(self, capability: int) -> int:
        """Warps of such programs that a multiprocessor holds, which has 64 Ki registers and room for 64 warps."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
        # A multiprocessor has 1 KiB more than a program may take, and each program takes 1 KiB more than it asks for.
        by_shared = (CHIPS[capability].shared_bytes + 1024) // (self.shared_bytes + 1024)
        return min(64 // self.warps, by_registers, by_shared) * self.warps


def record(call: Callable[[], object], capability: int) -> list[Launch]:
    """The launches that a call of launchers would make on a chip of this compute capability."""
    launches: list[Launch] = []

    def launcher(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def run(*args: object, **kwargs: object) -> None:
            given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            arguments = {name: given.pop(name) for name in kernel.arg_names}
            launches.append(Launch(kernel, arguments, given))

        return run

    with (
        mock.patch.object(JITFunction, "__getitem__", launcher),
        mock.patch.object(tiles, "OTHER", CHIPS[capability]),
    ):
        call()
    return launches


def specialise(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes, as Triton's runtime has them for such arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments.values(), strict=True)):
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        is_tensor, is_float = isinstance(value, torch.Tensor), isinstance(value, float)
        signature[parameter.name] = "*" + DTYPES[value.dtype] if is_tensor else "fp32" if is_float else "i32"
        if is_tensor or not is_float and value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compiled_for(launch: Launch, capability: int) -> triton.compiler.CompiledKernel:
    """The launch's kernel for chips of this compute capability."""
    source = ASTSource(launch.kernel, *specialise(launch))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def compile_for(launch: Launch, capability: int, *, count: bool = False) -> Resources:
    """What the compiler made of it; ``count``: the instructions too, which takes a second."""
    compiled = compiled_for(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name) if count else ""
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    ptx = compiled.asm["ptx"]
    return Resources(
        registers,
        stack + local,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        _widest(ptx, "ld"),
        _widest(ptx, "st"),
        _instructions(code) if count else None,
    )


def _output(*command: object) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(code: str) -> int:
    return len(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?[A-Z]", code, re.MULTILINE))


def _widest(ptx: str, kind: str) -> int:
    sizes = [0]
    for match in re.finditer(
        rf"\b{kind}\.global((?:\.\w+)*)|\bcp\.async\.\w+\.shared\.global \[[^;]*?, (0x\w+|\d+)", ptx
    ):
        if match[1] is None:
            sizes.append(int(match[2], 0) if kind == "ld" else 0)
            continue
        count = re.search(r"\.v(\d)", match[1])
        sizes.append(int(count[1] if count else 1) * int(re.search(r"\.[bfus](\d+)$", match[1])[1]) // 8)
    return max(sizes)


def layers(dtype: torch.dtype, channels_last: bool, full: bool = True) -> Iterator[tuple[str, Callable[[], object]]]:
    """Layers of the family, and calls of their launchers on tensors that are nowhere."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def image(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)

    def vector(*shape: int, wide: bool = False) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32 if wide and dtype.itemsize < 4 else dtype, device="meta")

    for c, size, k, s in (
        (16, 112, 3, 1),
        (24, 56, 3, 1),
        (72, 56, 5, 2),
        (240, 14, 3, 1),
        (672, 14, 5, 1),
        (960, 7, 5, 1),
    ):
        if not full and (c, k) not in ((24, 3), (672, 5)):
            continue
        x, w, y = image(32, c, size, size), vector(c, 1, k, k), image(32, c, -(-size // s), -(-size // s))
        geometry = (s, s), (k // 2, k // 2), (1, 1)
        label = f"{c} × {size}², {k} × {k}, stride {s}"
        yield (
            label,
            lambda x=x, w=w, g=geometry: triton_kernels.depthwise_conv2d(
                x, w, vector(w.shape[0]), *g, "hardswish", with_sums=channels_last
            ),
        )
        yield label, lambda x=x, w=w, y=y, g=geometry: triton_kernels.depthwise_conv2d_backward(y, x, w, *g)
    for c, k, size in ((16, 64, 112), (72, 24, 56), (40, 240, 28), (672, 112, 14), (960, 160, 7)):
        if not full and (c, k) not in ((72, 24), (672, 112)):
            continue
        x, w, y = image(32, c, size, size), vector(k, c, 1, 1), image(32, k, size, size)
        yield (
            f"{c} → {k} × {size}²",
            lambda x=x, w=w, y=y: triton_kernels.pointwise_conv2d(
                x, w, vector(w.shape[0]), "none", vector(32, w.shape[1], 1, 1), y
            ),
        )
    for c, size in ((16, 112), (72, 56), (960, 7)) if full else ((72, 56),):
        x, v, bias = image(32, c, size, size), vector(c, wide=True), vector(c)
        label = f"{c} × {size}²"
        yield label, lambda x=x, v=v: triton_kernels.batch_norm_act(x, v, v, v, v, 1e-3, "hardswish")
        yield label, lambda x=x, v=v: triton_kernels.batch_norm_act_training(x, v, v, v, v, 0.1, 1e-3, "hardswish")
        yield label, lambda x=x, v=v: triton_kernels.batch_norm_act_backward(x, x, v, v, v, v, "hardswish")
        yield label, lambda x=x, b=bias: triton_kernels.epilogue(x, b, x, activation="hardswish")
        yield label, lambda x=x: triton_kernels.global_avg_pool(x, out=image(*x.shape[:2], 1, 1))
        w = vector(c // 4, c, 1, 1)
        yield label, lambda x=x, w=w: triton_kernels.squeeze_excite(x, w, None, w.reshape(-1, len(w), 1, 1), None)
        yield label, lambda x=x: triton_kernels.sums_of_products(x, x)
    for c, k, size, kernel, s in (
        (3, 16, 224, (3, 3), 2),
        (3, 32, 224, (3, 3), 2),
        (64, 96, 35, (3, 3), 1),
        (160, 192, 17, (1, 7), 1),
        (192, 384, 17, (3, 3), 1),
    ):
        if not full and c not in (3, 192):
            continue
        x, y = image(32, c, size, size), image(32, 2 * k, -(-size // s), -(-size // s))[:, :k]
        w, bias = triton_kernels.pack_conv2d(vector(k, c, *kernel)), vector(k)
        geometry = kernel, (s, s), (kernel[0] // 2, kernel[1] // 2), (1, 1)
        inputs = {"": x, ", image contiguous": x.contiguous()} if channels_last and c == 3 else {"": x}
        for what, x in inputs.items():
            yield (
                f"{c} → {k} × {size}², {kernel[0]} × {kernel[1]}, stride {s}{what}",
                lambda a=(x, w, bias, *geometry, "relu6"), y=y: triton_kernels.conv2d(*a, out=y),
            )
    for c, size, k, s, mean in ((64, 147, 3, 2, False), (288, 35, 3, 1, True)):
        x, out = image(32, c, size, size), size if s == 1 else size // 2
        y = image(32, 2 * c, out, out)[:, :c]
        yield (
            f"{c} × {size}², {k} × {k}, stride {s}",
            lambda a=(x, (k, k), (s, s), (s % 2, s % 2), (1, 1), mean), y=y: triton_kernels.pool2d(*a, out=y),
        )
    if channels_last:
        v = vector(72, wide=True)
        yield "72", lambda v=v: triton_kernels.fold_batch_norm(v, v, v, v, 1e-3)
        for c, e, k, size, kernel, s in ((16, 64, 24, 112, 3, 2), (24, 72, 24, 56, 3, 1), (40, 120, 40, 28, 5, 1)):
            if dtype is torch.float64 or (not full and c != 24):  # no plan has fused blocks of float64
                continue
            x, out, hidden = image(32, c, size, size), size // s, image(32, e, size // s, size // s)
            expand, project = (vector(e, c, 1, 1), vector(e)), (vector(k, e, 1, 1), vector(k))
            depthwise, y = (vector(e, 1, kernel, kernel), vector(e)), image(32, k, out, out)
            rest = (s, s), (kernel // 2, kernel // 2), (1, 1), ("relu6", "relu6", "none")
            label = f"{c} → {e} → {k} × {size}², {kernel} × {kernel}, stride {s}"
            yield (
                label,
                lambda a=(x, expand, depthwise, None, *rest), y=hidden: triton_kernels.inverted_residual(
                    *a, out=y, with_sums=True
                ),
            )
            wide = image(32, e, size, size)
            yield (
                label,
                lambda a=(wide, None, depthwise, project, *rest), y=y: triton_kernels.inverted_residual(*a, out=y),
            )
            yield (
                label,
                lambda a=(x, expand, depthwise, project, *rest), y=y: triton_kernels.inverted_residual(*a, out=y),
            )


@dataclass(frozen=True)
class Row:
    """One kernel of a layer: its launch by compute capability."""

    label: str
    dtype: torch.dtype
    channels_last: bool
    launches: dict[int, Launch]


def rows(dtypes: list[str], capabilities: list[int], kernels: str) -> Iterator[Row]:
    """Float64, which is there for tests and for training that asks for it, is compiled for one architecture only."""
    for dtype, name in DTYPES.items():
        wanted = [c for c in capabilities if dtype is not torch.float64 or c == 90] if name in dtypes else []
        for channels_last in (True, False) if wanted else ():
            for label, call in layers(dtype, channels_last):
                for launches in zip(*(record(call, capability) for capability in wanted), strict=True):
                    if re.search(kernels, launches[0].name):
                        yield Row(label, dtype, channels_last, dict(zip(wanted, launches, strict=True)))


# Kernels cannot be sent to other processes: these are forked when the list is full.
_jobs: list[tuple[Launch, int]] = []


def compile_all(table: list[Row], processes: int) -> dict[tuple[int, int], Resources]:
    """What becomes of each row's launches, by row and capability; what several have in common is compiled once."""
    names: dict[tuple[int, int], str] = {}
    jobs: dict[str, tuple[Launch, int]] = {}
    for index, row in enumerate(table):
        for capability, launch in row.launches.items():
            name = repr((launch.name, specialise(launch), launch.options, capability))
            names[index, capability] = name
            jobs.setdefault(name, (launch, capability))
    _jobs[:] = jobs.values()
    results: dict[str, Resources] = {}
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for name, resources in zip(jobs, pool.imap(_compile_job, range(len(jobs))), strict=True):
            launch, capability = jobs[name]
            results[name] = resources
            print(f"{len(results)} of {len(jobs)}: {launch.name}, sm_{capability}: {resources}", flush=True)
    return {key: results[name] for key, name in names.items()}


def _compile_job(index: int) -> Resources:
    return compile_for(*_jobs[index])


def page(table: list[Row], compiled: dict[tuple[int, int], Resources], capabilities: list[int]) -> str:
    """docs/triton.md."""
    head = ["kernel", "layer, batch 32", "dtype", "layout", "load, store", *(f"sm_{c}" for c in capabilities)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for index, row in enumerate(table):
        found = {c: compiled[index, c] for c in row.launches}
        load, store = (min(getattr(r, f"{kind}_bytes") for r in found.values()) for kind in ("load", "store"))
        layout = "channels_last" if row.channels_last else "contiguous"
        name = next(iter(row.launches.values())).name
        lines.append(f"| {name} | {row.label} | {DTYPES[row.dtype]} | {layout} | {load}, {store} |")
        for capability in capabilities:
            r = found.get(capability)
            lines[-1] += f" {_cell(r, capability)} |" if r else " |"
    spills = sum(r.spilled_bytes > 0 for r in compiled.values())
    too_much = sum(r.shared_bytes > CHIPS[c].shared_bytes for (_, c), r in compiled.items())
    made = f"Made by `python -m benchmarks.triton_offline`, triton {triton.__version__}."
    units = (
        "Loads and stores in bytes a thread; then registers · bytes of shared memory · resident warps. "
        f"In all, of {len(compiled)}: {spills} with spills, {too_much} with more shared memory than there is."
    )
    text = __doc__.partition("\n\n")[2]
    return "\n".join(["# Triton kernels as compiled", "", made, "", text, units, "", *lines, ""])


def _cell(resources: Resources, capability: int) -> str:
    spilled = f" · {resources.spilled_bytes} spilled" if resources.spilled_bytes else ""
    return f"{resources.registers} · {resources.shared_bytes} · {resources.resident_warps(capability)}{spilled}"


def depthwise_instructions() -> str:
    """Of depthwise layers as `accelerate` runs them, for sm_90: instructions an output element, and registers.

    Channels_last, filters and bias in float32, no activation.
    """
    dtypes = torch.float16, torch.float32
    lines = ["| layer, channels_last | float16 | float32 |", "|---|---|---|"]
    for c, size, k, s in (
        *((16, 112, 3, 1), (64, 112, 3, 2), (72, 56, 5, 2), (672, 14, 5, 1)),
        *((960, 7, 5, 1), (96, 56, 7, 1)),
    ):
        cells = []
        for dtype in dtypes:
            x, y = (
                torch.empty(32, c, n, n, dtype=dtype, device="meta", memory_format=torch.channels_last)
                for n in (size, -(-size // s))
            )
            filters = torch.empty(k, k, c, 1, device="meta").permute(2, 3, 0, 1)
            arguments = x, filters, torch.empty(c, device="meta"), (s, s), (k // 2, k // 2)
            (launch,) = record(lambda a=arguments, y=y: triton_kernels.depthwise_conv2d(*a, out=y), 90)
            a, found = launch.arguments, compile_for(launch, 90, count=True)
            outputs = a["ROWS"] * a["COLUMNS"] * a["PATCHES"] * a["BLOCK_C"] / (32 * found.warps)
            spilled = f", {found.spilled_bytes} bytes spilled" if found.spilled_bytes else ""
            cells.append(f"{found.instructions / outputs:.1f}, {found.registers}{spilled}")
        apart = f", stride {s}" if s > 1 else ""
        lines.append(f"| {c} × {size}², {k} × {k}{apart} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="*", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES.values()), choices=list(DTYPES.values()))
    parser.add_argument("--kernels", default="", help="only those whose names this regular expression finds")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/triton.md"))
    parser.add_argument("--instructions", action="store_true", help="print those of depthwise layers, and end")
    options = parser.parse_args()
    if options.instructions:
        print(depthwise_instructions())
        return
    table = list(rows(options.dtype, options.capability, options.kernels))
    compiled = compile_all(table, options.processes)
    options.output.write_text(page(table, compiled, options.capability))


if __name__ == "__main__":
    main()
