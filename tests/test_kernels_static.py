"""The machine code of the GPU kernels: no spills, 16 bytes per access, the model's bytes, room for threads."""

import pytest

from benchmarks import kernels, toolchain

pytestmark = pytest.mark.skipif(toolchain.missing() is not None, reason=str(toolchain.missing()))

# of a multiprocessor's threads, at least; 1/8 for all others. Half of them with 64 to 128 bytes in flight each are
# more than the memory of an H100 needs (20 to 30 KB per multiprocessor: bandwidth times latency).
OCCUPANCY = {
    "gram_kernel<float, 2>": 1 / 2,
    "gram_kernel<bf16, 2>": 1 / 2,
    "gram_kernel<float, 4>": 1 / 4,
    "update_kernel<StepRule<AdamW, float, float, false>, 2>": 1 / 2,
    "update_kernel<StepRule<AdamW, bf16, float, false>, 2>": 3 / 8,
    "update_kernel<StepRule<AdamW, bf16, float, true>, 2>": 1 / 4,
    "update_kernel<CombineRule<float>, 2>": 1 / 2,
    "gram_update_kernel<StepRule<AdamW, float, float, false>, 2>": 3 / 8,
    "gram_update_kernel<StepRule<AdamW, bf16, float, false>, 2>": 1 / 4,
}
# a group of elements takes registers
IN_PARTS = {
    "gram_kernel<float, 2>": 3 / 8,
    "gram_kernel<bf16, 2>": 3 / 8,
    "gram_update_kernel<StepRule<AdamW, float, float, false>, 2>": 1 / 4,
}

#: Where all kernels are looked at; of the others those of OCCUPANCY.
WHOLE = (80, 90, 100)


def of(arch):
    return [kernel for kernel in kernels.KERNELS if arch in WHOLE or kernel.name in OCCUPANCY]


@pytest.fixture(scope="module", params=kernels.ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def compiled(request, tmp_path_factory):
    return kernels.cuda_kernels(tmp_path_factory.mktemp("kernels"), request.param, of(request.param))


@pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda kernel: kernel.name)
def test_machine_code(compiled, kernel):
    if kernel not in compiled:
        pytest.skip("is looked at for other architectures")
    code = compiled[kernel]
    loop = code.main_loop()
    elements = loop.elements(kernel, code.arch)
    assert code.spilled == code.spilled_by_calls == 0
    assert loop.count("LDL") == loop.count("STL") == 0
    # known to be global memory, and whole words
    assert {(opcode, size) for opcode, size in loop.accesses() if opcode.endswith("G")} == set(loop.accesses())
    assert {size for _, size in loop.accesses()} == {16}
    if kernel.bytes is not None:
        assert loop.bytes() == kernel.bytes * elements
    occupancy = OCCUPANCY if code.arch in kernels.FLOAT64 else OCCUPANCY | IN_PARTS
    assert code.occupancy() >= occupancy.get(kernel.name, 1 / 8)


# of the main loop's instructions and bytes in flight: what the loop over single elements may need, and must have
SINGLES = {"instructions": 1.6, "in flight": 0.4}
# those of few instructions, far from their memory's time
COMBINE = 3.0
#: How many times as long they may take as words, by the model `kernels.limits`.
TIMES = {"H100": 1.1, "RTX 4090": 1.0, "B200": 2.2}


@pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda kernel: kernel.name)
def test_single_elements(compiled, kernel):
    """Tensors that are not aligned: as many bytes, about as many in flight, not many more instructions."""
    if kernel not in compiled:
        pytest.skip("is looked at for other architectures")
    if "double" in kernel.name:
        pytest.skip("elements of 8 bytes, as addresses have")
    code = compiled[kernel]
    words, singles = code.main_loop(), code.singles_loop(kernel)
    elements = singles.elements(kernel, code.arch)
    assert singles.wide() == 0
    assert {size for _, size in singles.accesses()} <= set(kernels.ELEMENTS)  # no address is loaded
    assert singles.bytes(kernels.ELEMENTS) == words.bytes() / words.elements(kernel, code.arch) * elements
    ratio = len(singles.code) / elements / (len(words.code) / words.elements(kernel, code.arch))
    assert ratio <= (COMBINE if "Combine" in kernel.name else SINGLES["instructions"])
    assert singles.in_flight(kernels.ELEMENTS) >= SINGLES["in flight"] * words.in_flight()


def test_time_of_single_elements(compiled):
    """By the model, memory remains the limit, or nearly so, but for half types on a B200."""
    (arch,) = {code.arch for code in compiled.values()}
    for gpu in kernels.SINGLES_GPUS:
        for kernel in kernels.KERNELS if gpu.arch == arch else ():
            if kernel.name in kernels.SINGLES and kernel in compiled:
                words, singles = (max(kernels.limits(gpu, kernel, compiled[kernel], each)) for each in (False, True))
                assert singles <= TIMES[gpu.name] * words


def test_float64_of_the_sums(compiled):
    """Of two gradients: 2 conversions and 3 multiply-adds an element; in parts 6 operations for 16 elements."""
    found = {}
    for kernel, code in compiled.items():
        loop = code.main_loop()
        found[kernel.name] = loop.float64() / loop.elements(kernel, code.arch)
    slow = code.arch not in kernels.FLOAT64
    assert found["gram_kernel<float, 2>"] == (6 / 16 if slow else 5)
    assert found["gram_kernel<bf16, 2>"] == (6 / 16 if slow else 5)
    assert found["gram_kernel<float, 4>"] == (20 / 16 if slow else 14)


def test_step_of_two_float32_gradients_moves_40_bytes_per_parameter(compiled):
    total = 0
    for kernel, code in compiled.items():
        if kernel.name in ("gram_kernel<float, 2>", "update_kernel<StepRule<AdamW, float, float, false>, 2>"):
            loop = code.main_loop()
            total += loop.bytes() / loop.elements(kernel, code.arch)
    assert total == 40
