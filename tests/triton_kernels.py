"""Every Triton kernel, compiled for a GPU that need not be there: what ptxas makes of it can be read and counted."""

import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dtokd_kernels.rules import RULES
from dtokd_kernels.triton import solve, update
from dtokd_kernels.triton.gram import LANES, gram_kernel, gram_sum_kernel
from dtokd_kernels.triton.tables import CHUNK, DTYPES, INTERPRETED, VECTOR_BYTES


class Variant(NamedTuple):
    """A kernel and the constants of one of its specializations, as a launch would give them."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, Any]


#: Types of the arguments that are no constants, in all kernels; pointers are 16-byte aligned, as torch's memory is.
_TYPES = {
    "table": "*i64", "T": "i32", "chunks": "i32", "first": "i32", "shared": "i32", "private": "i32",
    "plain": "i32", "ticket": "*i32", "grams": "*fp64", "partials": "*fp64", "out": "*fp64",
    "coefficients": "*fp64", "skipped": "*i1", "tensor_lr": "*fp64", "numbers": "*fp64",
    "gram": "*fp64", "losses": "*fp64", "given": "*fp64", "present": "*i1", "values": "*fp64", "flags": "*i1",
}  # fmt: skip


#: Titles, update rules and numbers of states.
UPDATES = (("adamw", "adamw", 2), ("adamw amsgrad", "adamw", 3), ("lion", "lion", 1), ("sgd", "sgd", 1))


def variants(
    objectives: tuple[int, ...] = (2,),
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES),
) -> Iterator[Variant]:
    """Every kernel, for these numbers of objectives and dtypes; options that change no loop are left at one value."""
    sums = {"LANES": LANES}
    warps = {"num_warps": LANES // 32}
    for K in objectives:
        yield Variant(f"gram_sum K={K}", gram_sum_kernel, {"K": K, **sums}, warps)
        solved = {"K": K, "OBJECTIVES": triton.next_power_of_2(K), "CLAMP": True}
        yield Variant(f"min_norm K={K}", solve.min_norm_kernel, {**solved, "present": None}, solve.compiled(K))
        record = {**solved, "LOG_GRADIENTS": True, "RESCALE_SUM": False, "given": None, **sums}
        there = dict.fromkeys(("partials", "shared", "private", "plain", "ticket"))
        yield Variant(f"balance K={K}", solve.balance_kernel, {**record, **there}, solve.compiled(K))
        yield Variant(f"gram_balance K={K}", solve.balance_kernel, record, {**warps, "enable_fp_fusion": False})
        for dtype in dtypes:
            what = f"{str(dtype).removeprefix('torch.')} K={K}"
            vector = VECTOR_BYTES // dtype.itemsize
            constants = {"K": K, "REACH": 2**K - 1, "DTYPE": DTYPES[dtype], "CHUNK": CHUNK, "VECTOR": vector, **sums}
            yield Variant(f"gram {what}", gram_kernel, constants, warps)
            common = {"K": K, "REACH": 2**K - 1, "tensor_lr": None, **update.constants(dtype)}
            common |= {"STATES": 0, "MAXIMIZE": False, "NESTEROV": False, "FIRST": False}
            unused = dict.fromkeys(("skipped", "ticket", "numbers", "partials"))
            yield Variant(
                f"combine {what}", update.update_kernel, {**common, **unused, "RULE": "combine"}, update.OPTIONS
            )
            for measure in (False, True):
                name = f"measuring {what}" if measure else what
                beside = {**common, **({} if measure else {"partials": None})}
                for title, rule, states in UPDATES:
                    uncounted = {} if RULES[rule].counts_steps else {"ticket": None}
                    constants = {**beside, **uncounted, "RULE": rule, "STATES": states}
                    yield Variant(f"{title} {name}", update.update_kernel, constants, update.OPTIONS)


def compile(variant: Variant, capability: int) -> Any:
    """A kernel for compute capability `capability` (90: sm_90), without a GPU.

    Returns:
        What triton compiled: `.asm["ptx"]` is text, `.asm["cubin"]` binary; `.metadata` has num_warps and shared.

    Raises:
        RuntimeError: the kernels of this process are interpreted.
    """
    if INTERPRETED:
        raise RuntimeError("compile: TRITON_INTERPRET=1 replaces the compiler; run it in another process")
    signature, attributes, constants = {}, {}, {}
    for index, parameter in enumerate(variant.kernel.params):
        name = parameter.name
        if name in variant.constants:
            signature[name] = "constexpr"
            constants[(index,)] = variant.constants[name]
        else:
            signature[name] = parameter.annotation_type or _TYPES[name]
            if signature[name].startswith("*"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))


def sass(compiled: Any) -> str:
    """The machine code of what `compile` returned, as text: by the cuobjdump that triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
