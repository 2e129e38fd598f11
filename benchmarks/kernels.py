"""What the compilers make of the GPU kernels, read without a GPU: `python -m benchmarks.kernels [--arch 80 90 ...]`.

For each kernel and architecture: registers, spilled bytes, static shared memory, occupancy; and of the main loop its
instructions and those in float64, how many of its accesses to global memory move 16 bytes, and the bytes it moves per
element, against what the tensors hold; and how its loop over single elements, for tensors that are not aligned,
compares to it. Nothing here is a time. `--model` makes one of the instructions: for GPUs that have little float64, how
much longer than fused AdamW a step of two float32 gradients takes, with sums in float64 and with what is compiled for
that GPU; and what limits a kernel that accesses words, and one that accesses single elements.
"""

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import toolchain

#: Compute capabilities as ptxas names them: shared memory of a multiprocessor, KiB, and its threads.
ROOM = {80: (164, 2048), 89: (100, 1536), 90: (228, 2048), 100: (228, 2048), 103: (228, 2048), 120: (100, 1536)}
ARCHITECTURES = tuple(ROOM)
THREADS = 256


@dataclass(frozen=True)
class Kernel:
    """An instance of a kernel template.

    Attributes:
        name: as C++ names it.
        work: the instruction of which its main loop has a fixed number per element, and that number.
        bytes: per element, what it must read and write; None if that depends on which tensors are there, or where.
    """

    name: str
    work: tuple[str, int]
    bytes: int | None
    in_parts: tuple[str, int] | None = None  # `work`, where sums are taken in parts and that makes a difference


#: Where the sums of products are in float64, as csrc/cuda/parts.cuh has it; elsewhere they are in parts of float32.
FLOAT64 = (80, 90, 100)

#: DFMA: a pair's product. MUFU.RSQ: one square root. MUFU.RCP: one division. FFMA: a gradient's share; in parts what a
#: product rounds off, or two for half types. LDG: four elements of one of four tensors.
KERNELS = (
    Kernel("gram_kernel<float, 2>", ("DFMA", 3), 8, ("FFMA", 3)),
    Kernel("gram_kernel<double, 2>", ("DFMA", 3), 16),
    Kernel("gram_kernel<bf16, 2>", ("DFMA", 3), 4, ("FFMA", 6)),
    Kernel("gram_kernel<f16, 2>", ("DFMA", 3), 4, ("FFMA", 6)),
    Kernel("gram_kernel<float, 4>", ("DFMA", 10), 16, ("FFMA", 10)),
    Kernel("gram_kernel<float, 8>", ("DFMA", 36), 32, ("FFMA", 36)),
    Kernel("update_kernel<StepRule<AdamW, float, float, false>, 2>", ("MUFU.RSQ", 1), 8 + 12 + 12),
    Kernel("update_kernel<StepRule<AdamW, float, bf16, false>, 2>", ("MUFU.RSQ", 1), 8 + 8 + 8),
    Kernel("update_kernel<StepRule<AdamW, bf16, float, false>, 2>", ("MUFU.RSQ", 1), 4 + 10 + 10),
    Kernel("update_kernel<StepRule<AdamW, bf16, bf16, false>, 2>", ("MUFU.RSQ", 1), 4 + 6 + 6),
    Kernel("update_kernel<StepRule<AdamW, bf16, float, true>, 2>", ("MUFU.RSQ", 1), None),
    Kernel("update_kernel<StepRule<AdamW, float, float, false>, 4>", ("MUFU.RSQ", 1), 16 + 12 + 12),
    Kernel("update_kernel<StepRule<Lion, float, float, true>, 2>", ("MUFU.RCP", 1), 8 + 8 + 8),
    Kernel("update_kernel<CombineRule<float>, 2>", ("FFMA", 2), 8 + 4),
    Kernel("update_kernel<CombineRule<bf16>, 2>", ("FFMA", 2), 4 + 2),
    Kernel("gram_update_kernel<StepRule<AdamW, float, float, false>, 2>", ("MUFU.RSQ", 1), 8 + 12 + 12),
    Kernel("gram_update_kernel<StepRule<AdamW, float, float, false>, 4>", ("MUFU.RSQ", 1), 16 + 12 + 12),
    Kernel("gram_update_kernel<StepRule<AdamW, float, float, false>, 8>", ("MUFU.RSQ", 1), 32 + 12 + 12, ("FFMA", 36)),
    Kernel("gram_update_kernel<StepRule<AdamW, float, bf16, false>, 2>", ("MUFU.RSQ", 1), 8 + 8 + 8),
    Kernel("gram_update_kernel<StepRule<AdamW, bf16, float, false>, 2>", ("MUFU.RSQ", 1), 4 + 10 + 10),
    Kernel("gram_update_kernel<StepRule<AdamW, bf16, bf16, false>, 2>", ("MUFU.RSQ", 1), 4 + 6 + 6),
    Kernel("gram_update_kernel<StepRule<AdamW, bf16, float, true>, 8>", ("MUFU.RSQ", 1), None),
    Kernel("gram_update_kernel<StepRule<SGD, float, float, true>, 2>", ("DFMA", 3), 8 + 8 + 8, ("LDG", 1)),
    Kernel("resident_kernel<StepRule<AdamW, float, float, false>, 2>", ("MUFU.RSQ", 1), None),
    Kernel("resident_kernel<StepRule<AdamW, bf16, float, false>, 2>", ("MUFU.RSQ", 1), None),
)


#: Bytes of an access to a word, and to a single element of the types that models are trained in.
WORDS, ELEMENTS = (16, 32), (2, 4)
#: Bytes that the modifiers of a load or store stand for.
SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Instruction:
    """A line of machine code."""

    address: int
    predicated: bool
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else None

    def ends(self) -> bool:
        """Whether no thread goes on to what follows."""
        return not self.predicated and self.opcode.split(".")[0] in ("BRA", "RET", "EXIT")

    def access(self) -> tuple[str, int] | None:
        """LDG or LD, STG or ST, and the bytes; None if it is something else."""
        opcode, *modifiers = self.opcode.split(".")
        if opcode not in ("LDG", "STG", "LD", "ST"):
            return None
        return opcode, next((SIZES[m] for m in modifiers if m in SIZES), 4)


@dataclass(frozen=True)
class Loop:
    """Instructions of a loop. LDG and STG access global memory; LD and ST memory that the compiler knows no more of."""

    code: tuple[Instruction, ...]

    def accesses(self) -> Counter[tuple[str, int]]:
        """How many loads and stores there are of each opcode and number of bytes."""
        return Counter(access for i in self.code if (access := i.access()) is not None)

    def wide(self) -> int:
        """Accesses of 16 bytes."""
        return sum(count for (_, size), count in self.accesses().items() if size in WORDS)

    def narrow(self) -> int:
        """Accesses of single elements of float32 or half types."""
        return sum(count for (_, size), count in self.accesses().items() if size in ELEMENTS)

    def bytes(self, sizes: Sequence[int] = WORDS, opcodes: Sequence[str] = ("LDG", "STG", "LD", "ST")) -> int:
        """What a thread loads and stores in one pass, by accesses of these sizes."""
        return sum(s * count for (op, s), count in self.accesses().items() if s in sizes and op in opcodes)

    def in_flight(self, sizes: Sequence[int] = WORDS) -> int:
        """Bytes of a thread that are on their way together: loaded before the first of them is used."""
        waiting: dict[str, int] = {}
        most = 0
        for instruction in self.code:
            access = instruction.access()
            first, *others = instruction.operands.split(",")
            if waiting.keys() & set(re.findall(r"\bR\d+", ",".join(others))):
                waiting = {}
            if access is not None and access[0] in ("LDG", "LD") and access[1] in sizes:
                waiting[first.split(".")[0].strip()] = access[1]
                most = max(most, sum(waiting.values()))
        return most

    def count(self, opcode: str) -> int:
        """Instructions of this name, whatever modifiers follow."""
        return sum(f"{i.opcode}.".startswith(f"{opcode}.") for i in self.code)

    def float64(self) -> int:
        """Instructions that float64 units execute, conversions among them."""
        return sum(i.opcode.split(".")[0] in ("DFMA", "DADD", "DMUL", "DSETP") or ".F64" in i.opcode for i in self.code)

    def elements(self, kernel: Kernel, arch: int) -> float:
        """How many elements of a tensor a thread is through with after one pass."""
        opcode, per_element = kernel.in_parts if kernel.in_parts and arch not in FLOAT64 else kernel.work
        return self.count(opcode) / per_element


@dataclass(frozen=True)
class Compiled:
    """What ptxas prints about a kernel, and its machine code."""

    symbol: str
    arch: int
    registers: int
    shared: int
    spilled: int  # bytes of spill stores and loads
    spilled_by_calls: int  # the same of the functions it calls: rare paths, and what one block does once
    code: tuple[Instruction, ...]

    def occupancy(self) -> float:
        """The share of a multiprocessor's threads that its registers and shared memory leave room for."""
        # registers are granted to warps in portions of 256; a block's shared memory has 1 KiB beside it
        per_warp = -(-self.registers * 32 // 256) * 256
        blocks = 65536 // (per_warp * THREADS // 32)
        kibibytes, most = ROOM[self.arch]
        return min(blocks, (kibibytes << 10) // (self.shared + 1024), most // THREADS) * THREADS / most

    def _loops(self) -> list[Loop]:
        loops = []
        for branch in self.code:
            target = branch.target()
            if target is not None and target <= branch.address:
                loops.append(Loop(tuple(i for i in self.code if target <= i.address <= branch.address)))
        return loops

    def _stretches(self) -> list[Loop]:
        """What follows a branch up to where no thread goes on, except over what it has jumped over."""
        stretches = []
        for before, start in enumerate(self.code):
            if not start.opcode.startswith("BRA"):
                continue
            stretch: list[Instruction] = []
            after: set[int | None] = set()
            for instruction in self.code[before + 1 :]:
                if stretch and stretch[-1].ends() and instruction.address not in after:
                    break
                stretch.append(instruction)
                after.add(instruction.target())
            stretches.append(Loop(tuple(stretch)))
        return stretches

    def main_loop(self) -> Loop:
        """The loop with the most accesses of 16 bytes to memory, and the shortest of those."""
        return max(self._loops(), key=lambda loop: (loop.wide(), -len(loop.code)), default=Loop(()))

    def singles_loop(self, kernel: Kernel) -> Loop:
        """The same of single elements; what is left of it, where no thread makes a second pass."""
        loops = [loop for loop in self._loops() if loop.narrow() > 0 and loop.elements(kernel, self.arch) >= 1]
        if loops:
            return max(loops, key=lambda loop: (loop.narrow(), -len(loop.code)))
        needed = ((s, (kernel.bytes or 0) * s.elements(kernel, self.arch)) for s in self._stretches())
        whole = [stretch for stretch, size in needed if stretch.bytes(ELEMENTS) == size > 0]
        return min(whole, key=lambda stretch: len(stretch.code) / stretch.bytes(ELEMENTS), default=Loop(()))


def assemble(ptx: Path, arch: int) -> list[Compiled]:
    """What ptxas makes of the kernels in a file of PTX.

    Raises:
        toolchain.ToolError: a tool is missing or failed.
    """
    cubin = ptx.with_suffix(".cubin")
    said = toolchain.run([_tool("ptxas"), "-v", f"-arch=sm_{arch}", ptx, "-o", cubin])
    sass = toolchain.run([_tool("cuobjdump"), "-sass", cubin])
    codes = {}
    for function in re.split(r"\bFunction : ", sass)[1:]:
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", function)
        codes[function.split()[0]] = tuple(
            Instruction(int(at, 16), bool(predicate), opcode, rest) for at, predicate, opcode, rest in found
        )
    result = []
    for entry in said.split("Compiling entry function '")[1:]:
        symbol = entry.split("'")[0]
        registers, rest = re.search(r"Used (\d+) registers(.*)", entry).groups()  # type: ignore[union-attr]
        shared = re.search(r"(\d+) bytes smem", rest)
        # of the kernel itself first, then of each function
        own, *calls = (
            sum(map(int, pair)) for pair in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill", entry)
        )
        memory = int(shared[1]) if shared else 0
        result.append(Compiled(symbol, arch, int(registers), memory, own, sum(calls), codes[symbol]))
    return result


def _tool(name: str) -> Path:
    path = toolchain.binary_tool(name)
    if path is None:
        raise toolchain.ToolError(f"{name} is neither in nvcc's toolkit nor in triton")
    return path


def cuda_kernels(
    folder: Path, arch: int, kernels: Sequence[Kernel] = KERNELS, flags: Sequence[str] = ()
) -> dict[Kernel, Compiled]:
    """The project's CUDA kernels, compiled for an architecture (90: sm_90) in `folder`, with more flags for nvcc."""
    compiled = assemble(toolchain.compile_kernels([k.name for k in kernels], folder, arch, flags), arch)
    names = toolchain.run(["c++filt", *(c.symbol for c in compiled)]).splitlines()
    result = {}
    for kernel in kernels:
        plain = [re.sub(r"\b\w+::", "", name) for name in names]
        (index,) = (i for i, name in enumerate(plain) if name.startswith(f"void {kernel.name}("))
        result[kernel] = compiled[index]
    return result


HEADER = (
    *("kernel", "sm", "regs", "spill", "smem", "occupancy", "loop", "/element", "float64", "16 byte", "bytes/element"),
    *("model", "singles/element", "in flight"),
)


def row(kernel: Kernel, compiled: Compiled) -> tuple[str, ...]:
    """A line of the table."""
    loop, singles = compiled.main_loop(), compiled.singles_loop(kernel)
    accesses, elements = loop.accesses(), loop.elements(kernel, compiled.arch)
    return (
        kernel.name,
        str(compiled.arch),
        str(compiled.registers),
        f"{compiled.spilled} + {compiled.spilled_by_calls}",
        str(compiled.shared),
        f"{compiled.occupancy():.0%}",
        str(len(loop.code)),
        f"{len(loop.code) / elements:.1f}",
        f"{loop.float64() / elements:.2f}",
        f"{loop.wide()} of {accesses.total()}",
        f"{loop.bytes() / elements:g}",
        "-" if kernel.bytes is None else str(kernel.bytes),
        f"{len(singles.code) / singles.elements(kernel, compiled.arch):.1f}" if singles.code else "-",
        f"{loop.in_flight()}, {singles.in_flight(ELEMENTS)}",
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip() for r in rows)


@dataclass(frozen=True)
class Gpu:
    """What its maker says of a GPU, and the code it runs.

    Attributes:
        arch: 89 for 8.6 too.
        multiprocessors: how many.
        gigahertz: their clock.
        bandwidth: terabytes a second.
        float64: operations in a clock of a multiprocessor, a multiply-add being one.
    """

    name: str
    arch: int
    multiprocessors: int
    gigahertz: float
    bandwidth: float
    float64: int = 2

    def clocks(self, loop: Loop, elements: float, tensor_bytes: int) -> tuple[float, ...]:
        """Of a multiprocessor per element of a kernel's main loop: for memory, all instructions, those in float64.

        The longest is the model of its time: memory at 9 tenths of its bandwidth, 4 warps' instructions a clock.
        """
        per_second = self.multiprocessors * self.gigahertz * 1e9
        memory = tensor_bytes / (0.9 * self.bandwidth * 1e12) * per_second
        return memory, len(loop.code) / elements / 128, loop.float64() / elements / self.float64


#: Clocks from a load to what it brings, when memory is busy: assumed.
LATENCY = 1000


def limits(gpu: Gpu, kernel: Kernel, code: Compiled, singles: bool) -> tuple[float, ...]:
    """`Gpu.clocks` of the loop over words or single elements, and two more: for the L1 cache, and for waiting.

    The cache finds one line of 128 bytes a clock. Single elements that a warp accesses together follow one another or,
    where sums are taken, are as far apart as its threads' words are. Each thread waits once for what it has in flight
    at a time.
    """
    loop, sizes = (code.singles_loop(kernel), ELEMENTS) if singles else (code.main_loop(), WORDS)
    elements = loop.elements(kernel, code.arch)
    assert kernel.bytes is not None
    accesses = {size: sum(n for (_, s), n in loop.accesses().items() if s == size) for size in sizes}
    shared = 1 if not singles or kernel.name.startswith("update") else 16 // min(s for s in sizes if accesses[s])
    lines = 0.0
    for size, count in accesses.items():
        lines += count * (-(-32 * size * shared // 128) + singles)  # one more, as they do not begin with a line
    waits = loop.bytes(sizes, ("LDG", "LD")) / loop.in_flight(sizes)
    waiting = waits * LATENCY / (elements * code.occupancy() * ROOM[code.arch][1])
    return *gpu.clocks(loop, elements, kernel.bytes), lines / (32 * elements), waiting


GPUS = (
    Gpu("B300", 103, 148, 1.92, 8.0),
    Gpu("RTX 3090", 89, 82, 1.70, 0.936),
    Gpu("RTX 4090", 89, 128, 2.52, 1.008),
    Gpu("RTX 5090", 120, 170, 2.41, 1.792),
)
#: Those of which `single_rows` are made.
SINGLES_GPUS = (
    Gpu("H100", 90, 132, 1.755, 3.35, float64=64),
    Gpu("B200", 100, 148, 1.85, 8.0, float64=64),
    GPUS[2],
)
SINGLES = (
    *("gram_kernel<float, 2>", "gram_kernel<bf16, 2>"),
    *(
        f"{kernel}<StepRule<AdamW, {types}, false>, 2>"
        for kernel in ("update_kernel", "gram_update_kernel")
        for types in ("float, float", "bf16, float", "bf16, bf16")
    ),
)
#: The launches of a step, and of one with the weights of the step before; bytes of fused AdamW with one gradient.
STEP = ("gram_kernel<float, 2>", "update_kernel<StepRule<AdamW, float, float, false>, 2>")
LAG = ("gram_update_kernel<StepRule<AdamW, float, float, false>, 2>",)
FUSED_BYTES = 28


def model_rows() -> list[tuple[str, ...]]:
    """For each of GPUS: the limits of the Gram kernel, and the ratios of two kinds of step to fused AdamW."""
    rows: list[tuple[str, ...]] = [
        ("gpu", "sums", "gram: memory", "instructions", "float64", "step / fused AdamW", "lag / fused AdamW")
    ]
    chosen = [kernel for kernel in KERNELS if kernel.name in (*STEP, *LAG)]
    for gpu in GPUS:
        for sums, flags in (("float64", ["-DDTOKD_SUMS_IN_PARTS=0"]), ("in parts", [])):
            with tempfile.TemporaryDirectory() as folder:
                compiled = cuda_kernels(Path(folder), gpu.arch, chosen, flags)
            clocks = {}
            for kernel, code in compiled.items():
                loop = code.main_loop()
                elements = loop.elements(kernel, gpu.arch if not flags else FLOAT64[0])
                assert kernel.bytes is not None
                clocks[kernel.name] = gpu.clocks(loop, elements, kernel.bytes)
            if not flags:  # two loops: the sums, and the update that reads its gradients once more
                sums_of, update = clocks[STEP[0]], clocks[LAG[0]]
                clocks[LAG[0]] = (update[0], sums_of[1] + update[1], sums_of[2] + update[2])
            gram = clocks[STEP[0]]
            fused = gram[0] * FUSED_BYTES / 8
            ratios = [sum(max(clocks[name]) for name in names) / fused for names in (STEP, LAG)]
            rows.append((gpu.name, sums, *(f"{c:.2f}" for c in gram), *(f"{ratio:.2f}" for ratio in ratios)))
    return rows


def single_rows() -> list[tuple[str, ...]]:
    """For each of SINGLES_GPUS and kernel: the limits by words and by single elements, and the ratio of the longest."""
    rows: list[tuple[str, ...]] = [
        ("gpu", "kernel", "accesses", "memory", "instructions", "float64", "L1", "waiting", "to words")
    ]
    for gpu in SINGLES_GPUS:
        # an update that takes sums in parts has two loops, those of the other kernels
        names = [n for n in SINGLES if gpu.arch in FLOAT64 or not n.startswith("gram_update")]
        chosen = [kernel for kernel in KERNELS if kernel.name in names]
        with tempfile.TemporaryDirectory() as folder:
            compiled = cuda_kernels(Path(folder), gpu.arch, chosen)
        for kernel, code in compiled.items():
            words, singles = (limits(gpu, kernel, code, each) for each in (False, True))
            for name, clocks in (("words", words), ("singles", singles)):
                ratio = max(clocks) / max(words)
                rows.append((gpu.name, kernel.name, name, *(f"{c:.2f}" for c in clocks), f"{ratio:.2f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--model", action="store_true", help="the models of time")
    options = parser.parse_args()
    reason = toolchain.missing()
    if reason is not None:
        parser.exit(1, f"{reason}\n")
    if options.model:
        print(table(model_rows()), table(single_rows()), sep="\n\n")
        return
    rows: list[Sequence[str]] = [HEADER]
    for arch in options.arch:
        with tempfile.TemporaryDirectory() as folder:
            rows += [row(kernel, compiled) for kernel, compiled in cuda_kernels(Path(folder), arch).items()]
    print(table(rows))


if __name__ == "__main__":
    main()
