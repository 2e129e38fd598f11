"""PTX on the CPU: instructions by themselves, nvcc's PTX of the kernels to the bit, and what triton makes."""

import ctypes
import math
import re
import struct
import subprocess

import pytest
import torch

from benchmarks import toolchain

from . import cmake
from .ptx.library import Library
from .ptx.parser import PtxError
from .ptx.translator import translate_module

NAN, INF = math.nan, math.inf
HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"
KERNEL = """
.visible .entry {name}(.param .u64 out, .param .b64 pa, .param .b64 pb, .param .b64 pc)
{{
    .reg .pred %p<3>;
    .reg .b64 %rd<2>;
    .reg .{of} %a, %b, %c;
    .reg .{to} %d;
    ld.param.{of} %a, [pa];
    ld.param.{of} %b, [pb];
    ld.param.{of} %c, [pc];
    ld.param.u64 %rd1, [out];
    {instruction}
    st.global.{to} [%rd1], %d;
    ret;
}}
"""
FORMATS = {"b16": "<H", "s32": "<i", "b32": "<I", "b64": "<Q", "s64": "<q", "f32": "<f", "f64": "<d"}
# instruction, type of a, b and c, type of d, a b c, d
INSTRUCTIONS = [
    ("add.s32 %d, %a, %b;", "s32", "s32", (2**31 - 1, 1), -(2**31)),
    ("sub.u64 %d, %a, -1;", "b64", "b64", (2**64 - 1,), 0),
    ("mul.hi.s32 %d, %a, %b;", "s32", "s32", (-(2**31), 6), -3),
    ("mul.hi.u64 %d, %a, %b;", "b64", "b64", (2**63, 6), 3),
    ("mul.wide.s32 %d, %a, %b;", "s32", "s64", (-(2**31), 2), -(2**32)),
    ("mad.lo.s32 %d, %a, %b, %c;", "s32", "s32", (3, -4, 5), -7),
    ("mad.wide.u32 %d, %a, %a, 1;", "b32", "b64", (2**32 - 1,), (2**32 - 1) ** 2 + 1),
    ("div.s32 %d, %a, %b;", "s32", "s32", (-7, 2), -3),
    ("rem.s32 %d, %a, %b;", "s32", "s32", (-7, 3), -1),
    ("abs.s32 %d, %a;", "s32", "s32", (-7,), 7),
    ("neg.s32 %d, %a;", "s32", "s32", (7,), -7),
    ("min.s32 %d, %a, %b;", "s32", "s32", (-1, 1), -1),
    ("min.u32 %d, %a, %b;", "s32", "s32", (-1, 1), 1),
    ("shl.b32 %d, %a, 32;", "b32", "b32", (1,), 0),
    ("shr.u32 %d, %a, 40;", "b32", "b32", (2**31,), 0),
    ("shr.s32 %d, %a, 40;", "s32", "s32", (-8,), -1),
    ("shr.s32 %d, %a, 2;", "s32", "s32", (-8,), -2),
    ("bfe.s32 %d, %a, 4, 4;", "s32", "s32", (0x1F0,), -1),
    ("bfe.u32 %d, %a, 4, 4;", "b32", "b32", (0x1F0,), 15),
    ("bfi.b32 %d, %a, %b, 8, 4;", "b32", "b32", (0xFF, 0x70000001), 0x70000F01),
    ("prmt.b32 %d, %a, %b, 0x5410;", "b32", "b32", (0x33221100, 0x77665544), 0x55441100),
    ("prmt.b32 %d, %a, %b, 0xB123;", "b32", "b32", (0x80221100, 0), 0xFF112280),
    ("lop3.b32 %d, %a, %b, %c, 0x96;", "b32", "b32", (0xF0, 0xCC, 0xAA), 0xF0 ^ 0xCC ^ 0xAA),
    ("not.b32 %d, %a;", "b32", "b32", (1,), 2**32 - 2),
    ("popc.b32 %d, %a;", "b32", "b32", (0xF1,), 5),
    ("clz.b32 %d, %a;", "b32", "b32", (0x10000,), 15),
    ("mov.b64 %d, {%a, %b};", "b32", "b64", (1, 2), 2 << 32 | 1),
    ("mov.b64 {_, %d}, %a;", "b64", "b32", (5 << 32 | 7,), 5),
    ("add.rn.f32 %d, %a, %b;", "f32", "f32", (1.0, 2.0**-24), 1.0),
    ("fma.rn.f32 %d, %a, %a, %b;", "f32", "f32", (1 + 2.0**-12, -1 - 2.0**-11), 2.0**-24),
    ("div.rn.f64 %d, %a, %b;", "f64", "f64", (1.0, 3.0), 1 / 3),
    ("rcp.rn.f64 %d, %a;", "f64", "f64", (3.0,), 1 / 3),
    ("sqrt.rn.f64 %d, %a;", "f64", "f64", (2.0,), math.sqrt(2)),
    ("neg.f32 %d, %a;", "f32", "b32", (0.0,), 1 << 31),
    ("min.f32 %d, %a, %b;", "f32", "f32", (NAN, 1.0), 1.0),
    ("max.f64 %d, %a, %b;", "f64", "f64", (-1.0, NAN), -1.0),
    ("copysign.f32 %d, %a, %b;", "f32", "f32", (-0.0, 2.0), -2.0),
    ("mov.f32 %d, 0f3FC00000;", "f32", "f32", (), 1.5),
    ("cvt.rzi.s32.f32 %d, %a;", "f32", "s32", (-2.7,), -2),
    ("cvt.rzi.s32.f32 %d, %a;", "f32", "s32", (3e9,), 2**31 - 1),
    ("cvt.rzi.u32.f32 %d, %a;", "f32", "s32", (-3.0,), 0),
    ("cvt.rzi.s32.f32 %d, %a;", "f32", "s32", (NAN,), 0),
    ("cvt.rni.s32.f32 %d, %a;", "f32", "s32", (2.5,), 2),
    ("cvt.rmi.f32.f32 %d, %a;", "f32", "f32", (-2.5,), -3.0),
    ("cvt.rn.f32.f64 %d, %a;", "f64", "f32", (1 + 2.0**-24,), 1.0),
    ("cvt.rn.f32.s32 %d, %a;", "s32", "f32", (2**24 + 1,), 2.0**24),
    ("cvt.s64.s32 %d, %a;", "s32", "s64", (-5,), -5),
    ("cvt.u64.u32 %d, %a;", "s32", "s64", (-5,), 2**32 - 5),
    ("cvt.u32.u64 %d, %a;", "b64", "b32", (2**40 + 9,), 9),
    ("cvt.s32.s8 %d, %a;", "s32", "s32", (0x1FF,), -1),
    ("cvt.f32.bf16 %d, %a;", "b16", "f32", (0x3FC0,), 1.5),
    ("cvt.f32.f16 %d, %a;", "b16", "f32", (0x0001,), 2.0**-24),
    ("cvt.rn.bf16.f32 %d, %a;", "f32", "b16", (1 + 2.0**-8,), 0x3F80),
    ("cvt.rn.f16.f32 %d, %a;", "f32", "b16", (65520.0,), 0x7C00),
    ("cvt.rn.bf16x2.f32 %d, %a, %b;", "f32", "b32", (1.0, 1.5), 0x3F803FC0),
    ("setp.lt.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", "f32", "b32", (NAN, 1.0), 0),
    ("setp.ltu.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", "f32", "b32", (NAN, 1.0), 1),
    ("setp.ne.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", "f32", "b32", (NAN, 1.0), 0),
    ("setp.neu.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", "f32", "b32", (NAN, 1.0), 1),
    ("setp.nan.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", "f32", "b32", (1.0, NAN), 1),
    ("setp.lo.u32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", "s32", "b32", (1, -1), 1),
    ("setp.lt.s32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", "s32", "b32", (1, -1), 0),
    ("mov.pred %p1, -1; setp.eq.and.s32 %p2, %a, 1, !%p1; selp.b32 %d, 1, 0, %p2;", "s32", "b32", (1,), 0),
    ("setp.eq.s32 %p1|%p2, %a, 1; selp.b32 %d, 1, 0, %p2;", "s32", "b32", (2,), 1),
    ("mov.b32 %d, 1; setp.eq.s32 %p1, %a, 1; @!%p1 mov.b32 %d, 2;", "s32", "b32", (1,), 1),
]


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """One kernel for each of INSTRUCTIONS."""
    kernels = [
        KERNEL.format(name=f"k{i}", instruction=instruction, of=of, to=to)
        for i, (instruction, of, to, _, _) in enumerate(INSTRUCTIONS)
    ]
    return Library(HEADER + "".join(kernels), "instructions", tmp_path_factory.mktemp("instructions"))


def packed(kind, value):
    return int.from_bytes(struct.pack(FORMATS[kind], value), "little")


@pytest.mark.parametrize("number", range(len(INSTRUCTIONS)), ids=[i[0] for i in INSTRUCTIONS])
def test_instruction(instructions, number):
    _, of, to, operands, expected = INSTRUCTIONS[number]
    out = torch.zeros(1, dtype=torch.int64)
    values = [ctypes.c_uint64(packed(of, x)) for x in (*operands, 0, 0, 0)[:3]]
    instructions.launch(f"k{number}", (1,), (1,), [out, *values])
    assert int(out) % 2**64 == packed(to, expected)


# 64 threads: reversed through shared memory, summed over each warp, counted; a device function has a frame
THREADS = """
.shared .align 4 .b8 words[256];

.func (.param .b32 result) twice(.param .b32 x)
{
    .reg .b32 %r<3>;
    .reg .b64 %rd<2>;
    .local .align 8 .b8 frame[8];
    mov.u64 %rd1, frame;
    ld.param.b32 %r1, [x];
    st.local.b32 [%rd1+4], %r1;
    ld.local.b32 %r2, [%rd1+4];
    add.s32 %r2, %r2, %r1;
    st.param.b32 [result], %r2;
    ret;
}

.visible .entry threads(.param .u64 out, .param .u64 count)
{
    .reg .pred %p<2>;
    .reg .b32 %r<12>;
    .reg .b64 %rd<7>;
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, words;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
    st.shared.u32 [%r4], %r1;
    bar.sync 0;
    sub.s32 %r5, %r2, %r3;
    ld.shared.u32 %r6, [%r5+252];
    mov.u32 %r7, 16;
$L_loop:
    shfl.sync.bfly.b32 %r8|%p1, %r6, %r7, 31, -1;
    add.s32 %r6, %r6, %r8;
    shr.u32 %r7, %r7, 1;
    setp.ne.s32 %p1, %r7, 0;
    @%p1 bra $L_loop;
    setp.lt.u32 %p1, %r1, 5;
    vote.sync.ballot.b32 %r9, %p1, -1;
    add.s32 %r6, %r6, %r9;
    { // a call
        .param .b32 x;
        st.param.b32 [x], %r6;
        .param .b32 result;
        call.uni (result), twice, (x);
        ld.param.b32 %r10, [result];
    }
    ld.param.u64 %rd1, [out];
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r10;
    ld.param.u64 %rd4, [count];
    atom.global.add.u32 %r11, [%rd4], 1;
    ret;
}
"""


def test_threads_and_calls(tmp_path):
    library = Library(HEADER + THREADS, "threads", tmp_path)
    out, count = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    library.launch("threads", (1,), (64,), [out, count])
    sums = [sum(range(32, 64)) + 0b11111, sum(range(32))]
    assert out.tolist() == [2 * sums[0]] * 32 + [2 * sums[1]] * 32
    assert int(count) == 64


def test_misaligned_vectors_are_refused(tmp_path):
    kernel = KERNEL.format(
        name="k", of="b32", to="b32", instruction="{ .reg .b32 %v<2>; ld.global.v2.b32 {%d, %v1}, [%rd1+4]; }"
    )
    library = Library(HEADER + kernel, "misaligned", tmp_path)
    zero = ctypes.c_uint32(0)
    with pytest.raises(RuntimeError, match="misaligned access: 8 bytes"):
        library.launch("k", (1,), (1,), [torch.zeros(4, dtype=torch.int64), zero, zero, zero])


@pytest.mark.parametrize(
    "instruction", ["ex2.approx.f32 %d, %a;", "add.ftz.f32 %d, %a, %b;", "div.full.f32 %d, %a, %b;", "bar.sync 1;"]
)
def test_what_is_not_understood_is_named(instruction):
    kernel = KERNEL.format(name="k", of="f32", to="f32", instruction=instruction)
    with pytest.raises(PtxError, match=f"unsupported instruction: line 15: {re.escape(instruction.split()[0])}"):
        translate_module(HEADER + kernel, "kernel")


# what csrc/tests/cuda_tests.cpp launches, in part
KERNELS = [
    "gram_kernel<float, 2>",
    "gram_kernel<bf16, 2>",
    "gram_kernel<float, 4>",
    "update_kernel<StepRule<AdamW, float, float, false>, 2>",
    "update_kernel<StepRule<AdamW, bf16, float, true>, 2>",
    "update_kernel<StepRule<SGD, float, float, true>, 2>",
    "update_kernel<StepRule<Lion, float, float, true>, 2>",
    "update_kernel<CombineRule<bf16>, 2>",
    "gram_update_kernel<StepRule<AdamW, float, float, false>, 2>",
    "gram_update_kernel<StepRule<SGD, bf16, float, true>, 2>",
    "resident_kernel<StepRule<AdamW, float, float, false>, 2>",
]
# those whose sums are taken in parts where float64 is slow
IN_PARTS = [
    "gram_kernel<float, 2>",
    "gram_kernel<bf16, 2>",
    "gram_update_kernel<StepRule<SGD, float, float, true>, 2>",
    "gram_update_kernel<StepRule<SGD, bf16, float, true>, 2>",
    "resident_kernel<StepRule<AdamW, float, float, false>, 2>",
]


def run_cuda_tests(program):
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """(The folder of a target that was built without PTX, what it prints); both targets have one folder."""
    folder, printed = tmp_path_factory.mktemp("emulated"), {}

    def build(target):
        if target not in printed:
            printed[target] = run_cuda_tests(cmake.build(folder, target, DTOKD_PTX="") / target)
        return folder, printed[target]

    return build


def test_kernels_with_sums_in_parts(emulated):
    """An update that measures and a resident step have the bits of two launches there too."""
    _, (printed,) = emulated("dtokd_cuda_tests_in_parts")
    assert re.fullmatch(r"passed: [0-9a-f]{16}", printed)


@pytest.mark.skipif(toolchain.nvcc() is None, reason="no nvcc on PATH or in CUDA_HOME")
@pytest.mark.parametrize(
    ("target", "kernels", "arch"),
    [("dtokd_cuda_tests", KERNELS, 90), ("dtokd_cuda_tests_in_parts", IN_PARTS, 103)],
    ids=["float64", "in parts"],
)
def test_ptx_of_nvcc_has_the_bits_of_the_emulation(emulated, tmp_path, target, kernels, arch):
    folder, (expected,) = emulated(target)
    translated = tmp_path / "kernels.cpp"
    ptx = toolchain.compile_kernels(kernels, tmp_path, arch).read_text()
    translated.write_text(translate_module(ptx, "kernels.ptx"))
    *launches, last = run_cuda_tests(cmake.build(folder, target, DTOKD_PTX=translated) / target)
    assert len(launches) == len(kernels)
    assert all(int(re.search(r": (\d+) launches$", line)[1]) > 0 for line in launches)
    assert last == expected
