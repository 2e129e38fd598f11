"""Kernels broken on purpose: the checks that must see it, do. One change of the source at a time."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = ("-std=c++20", "-O0", "-g1", "-ffp-contract=off", "-w", "-Icsrc", "-Icsrc/include")
CHECKS = {"run": (), "thread": ("-fsanitize=thread",)}
SCHEDULES = {"run": ("forward", "reverse", "1", "2"), "thread": ("forward",)}
OBJECTS = {
    "gram": "csrc/cuda/launch_gram.cu",
    "adamw": "csrc/cuda/launch_adamw.cu",
    "sgd": "csrc/cuda/launch_rules.cu",
    "gram_adamw": "csrc/cuda/launch_gram_adamw.cu",
    "gram_sgd": "csrc/cuda/launch_gram_rules.cu",
    "resident": "csrc/cuda/launch_resident.cu",
    "tests": "csrc/tests/cuda_tests.cpp",
}
# by itself: it has the kernels it needs in it
PARTS = "csrc/tests/parts_tests.cpp"
RACE = "ThreadSanitizer: data race"
WRONG = "failed: "  # a result, in csrc/tests/cuda_tests.cpp


class Mutation(NamedTuple):
    """A change of `old` in csrc/cuda/`file` to `new`, compiled into `object`; `check` fails and says `said`.

    What device.h defines is linked from the first object, gram. `object` may be PARTS instead.
    """

    name: str
    file: str
    object: str
    old: str
    new: str
    check: str
    said: str


MUTATIONS = [
    Mutation(
        "no barrier before the warps' sums are added",
        "gram.cuh",
        "gram",
        "warp_sums(s, sums[threadIdx.x / 32]);\n  __syncthreads();",
        "warp_sums(s, sums[threadIdx.x / 32]);",
        "run",
        WRONG,
    ),
    Mutation(
        "no barrier before the warps' sums are overwritten",
        "gram.cuh",
        "gram",
        "__syncthreads();  // the last call's sums have been read",
        "",
        "thread",
        RACE,
    ),
    Mutation(
        "no barrier between the sums and the ticket",
        "gram.cuh",
        "gram",
        "table.first_chunk[e]));\n    __syncthreads();",
        "table.first_chunk[e]));",
        "thread",
        RACE,
    ),
    Mutation(
        "no barrier after the ticket",
        "gram.cuh",
        "gram",
        "__syncthreads();\n  if (!last) return;",
        "if (!last) return;",
        "thread",
        RACE,
    ),
    Mutation(
        "no fence before the ticket",
        "device.h",
        "gram",
        "__threadfence();\n  const bool last",
        "const bool last",
        "thread",
        RACE,
    ),
    Mutation(
        "no fence after the ticket",
        "device.h",
        "gram",
        "__threadfence();\n  return last;",
        "return last;",
        "thread",
        RACE,
    ),
    Mutation(
        "a ticket that is not atomic",
        "device.h",
        "gram",
        "atomicInc(ticket, total - 1) == total - 1",
        "(*ticket = (*ticket + 1) % total) == 0",
        "thread",
        RACE,
    ),
    Mutation(
        "a ticket that does not wrap",
        "device.h",
        "gram",
        "atomicInc(ticket, total - 1) == total - 1",
        "atomicInc(ticket, total) == total - 1",
        "run",
        "failed: ticket == 0",
    ),
    Mutation(
        "one thread of the other blocks stays",
        "gram.cuh",
        "gram",
        "if (!last) return;",
        "if (!last && threadIdx.x > 0) return;",
        "run",
        "the kernel",
    ),
    Mutation(
        "half a warp's mask",
        "gram.cuh",
        "gram",
        "__shfl_xor_sync(0xffffffff, mine[0], step)",
        "__shfl_xor_sync(0xffff, mine[0], step)",
        "run",
        "a mask that leaves it out",
    ),
    Mutation(
        "words where pointers are not aligned",
        "launch_gram.cu",
        "gram",
        "entry.aligned = is_aligned(entry.grads, P);",
        "entry.aligned = true;",
        "run",
        "misaligned access: 16 bytes",
    ),
    Mutation(
        "the last element left out",
        "vector_io.cuh",
        "gram",
        "if (i * kStride > last) element[i] = T{};",
        "if (i * kStride >= last) element[i] = T{};",
        "run",
        WRONG,
    ),
    Mutation(
        "the last slot left out",
        "gram.cuh",
        "gram",
        "end = job.slots[role + 1];",
        "end = job.slots[role + 1] ? job.slots[role + 1] - 1 : 0;",
        "run",
        WRONG,
    ),
    Mutation(
        "a squared gradient for a product",
        "gram.cuh",
        "gram",
        "fma(x[i][e], x[j][e], sums[p])",
        "fma(x[i][e], x[i][e], sums[p])",
        "run",
        WRONG,
    ),
    Mutation(
        "a word read twice",
        "gram.cuh",
        "gram",
        "place_in_tile<T>(first + u)",
        "place_in_tile<T>(first)",
        "run",
        WRONG,
    ),
    Mutation(
        "faces compared before they are solved",
        "solve.cuh",
        "gram",
        "__syncthreads();\n  if (threadIdx.x == 0) {\n    BestFace best;",
        "if (threadIdx.x == 0) {\n    BestFace best;",
        "run",
        WRONG,
    ),
    Mutation(
        "a skipped step taken",
        "update.cuh",
        "adamw",
        "if (job.direction.skipped && *job.direction.skipped) return;",
        "",
        "run",
        WRONG,
    ),
    Mutation(
        "gradients of negative coefficients not read",
        "update.cuh",
        "adamw",
        "shared.grads[k] = c != 0 ?",
        "shared.grads[k] = c > 0 ?",
        "run",
        WRONG,
    ),
    Mutation(
        "a chunk too far",
        "update.cuh",
        "adamw",
        "table.chunks() - 1 - blockIdx.x",
        "table.chunks() - blockIdx.x",
        "run",
        "",
    ),
    Mutation(
        "coefficients of shared parameters for all",
        "update.cuh",
        "sgd",
        "direction.coefficients[entry.role * direction.K + k]",
        "direction.coefficients[k]",
        "run",
        WRONG,
    ),
    Mutation(
        "no barrier after the block's numbers are made",
        "update.cuh",
        "adamw",
        "__syncthreads();\n\n  const typename Rule::Numbers numbers",
        "const typename Rule::Numbers numbers",
        "run",
        "misaligned access",
    ),
    Mutation(
        "steps counted by every block",
        "update.cuh",
        "adamw",
        "if (last) count_steps(table);",
        "count_steps(table);",
        "run",
        WRONG,
    ),
    Mutation(
        "the elements after the last word left out",
        "update.cuh",
        "sgd",
        "if (at < end) update_ragged<Rule, P>(entry, shared, at, end);",
        "",
        "run",
        WRONG,
    ),
    Mutation(
        "no barrier between the sums of an update that measures and its ticket",
        "gram_update.cuh",
        "gram_adamw",
        "__syncthreads();\n    if (threadIdx.x == 0) {\n      last_of_launch",
        "if (threadIdx.x == 0) {\n      last_of_launch",
        "thread",
        RACE,
    ),
    Mutation(
        "a skipped step taken by an update that measures",
        "gram_update.cuh",
        "gram_sgd",
        "const bool stored = !(direction.skipped && *direction.skipped);",
        "const bool stored = true;",
        "run",
        WRONG,
    ),
    Mutation(
        "a skipped step counted by an update that measures",
        "gram_update.cuh",
        "gram_adamw",
        "if (last_of_launch && stored)",
        "if (last_of_launch)",
        "run",
        WRONG,
    ),
    Mutation(
        "Inf beside an absent gradient measured",
        "gram_update.cuh",
        "gram_adamw",
        "  drop_absent<P>(entry.grads, sums);\n}",
        "}",
        "run",
        WRONG,
    ),
    Mutation(
        "elements after the last word measured in another order",
        "gram_update.cuh",
        "gram_adamw",
        "int64_t at = begin + threadIdx.x * N;",
        "int64_t at = begin + (threadIdx.x ^ (begin + threadIdx.x * N >= words_end)) * N;",
        "run",
        WRONG,
    ),
    Mutation(
        "an update that measures has one ticket for all",
        "launch_gram_update.h",
        "gram_adamw",
        "gram.scratch.tickets + 1",
        "gram.scratch.tickets",
        "run",
        "",
    ),
    Mutation(
        "no grid barrier between sums and weights",
        "resident.cuh",
        "resident",
        "grid_barrier(job.gram.scratch.tickets + 1);",
        "__syncthreads();",
        "thread",
        RACE,
    ),
    Mutation(
        "only the first of several tables takes a resident step",
        "launch_resident.cu",
        "resident",
        "if (tables.size() != 1) return kUnfit;",
        "",
        "run",
        WRONG,
    ),
    Mutation(
        "every kept tile in the room of the first",
        "resident.cuh",
        "resident",
        "tile.save(room + (r - kRegisters) * kRoom)",
        "tile.save(room)",
        "run",
        WRONG,
    ),
    Mutation(
        "one tile too many restored",
        "resident.cuh",
        "resident",
        "if (r - kRegisters < job.shared_tiles) {",
        "if (r - kRegisters <= job.shared_tiles) {",
        "run",
        WRONG,
    ),
    Mutation(
        "a tensor of two entries takes two steps",
        "resident.cuh",
        "resident",
        "if (table.entries[i].counts_step) *table",
        "*table",
        "run",
        WRONG,
    ),
    Mutation(
        "what a product rounds off left out of sums in parts",
        "parts.cuh",
        PARTS,
        "rest_of_low += add_leading(second, low);",
        "",
        "run",
        WRONG,
    ),
    Mutation(
        "what the second part does not take left out",
        "parts.cuh",
        PARTS,
        "rest += add_leading(second, add_leading(first, product));",
        "add_leading(second, add_leading(first, product));",
        "run",
        WRONG,
    ),
    Mutation(
        "the largest numbers scaled to 0",
        "parts.cuh",
        PARTS,
        "exponent <= 252",
        "exponent <= 253",
        "run",
        WRONG,
    ),
    Mutation(
        "subnormal numbers in parts",
        "parts.cuh",
        PARTS,
        "(exponent >= 1 || largest == 0)",
        "exponent >= 0",
        "run",
        WRONG,
    ),
    Mutation(
        "NaN taken for a number of spacings",
        "parts.cuh",
        PARTS,
        "uint64_t(x == x ? 1023 + n : 2047)",
        "uint64_t(1023 + n)",
        "run",
        WRONG,
    ),
    Mutation(
        "a group that parts cannot do left out",
        "gram.cuh",
        PARTS,
        "sums = add_again<T, P>(grads, tile, first, left, sums);",
        "",
        "run",
        WRONG,
    ),
]


def compile_object(folder: Path, name: str, check: str, output: Path) -> None:
    command = ["g++", "-x", "c++", *FLAGS, *CHECKS[check], "-c", OBJECTS.get(name, name), "-o", output]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def run_tests(folder: Path, objects: list[Path], check: str) -> tuple[bool, str]:
    """Whether the tests pass under every schedule, and what they say."""
    program = folder / "tests"
    subprocess.run(["g++", "-rdynamic", *CHECKS[check], *objects, "-o", program], check=True)
    output, passed = "", True
    for schedule in SCHEDULES[check]:
        environment = {**os.environ, "DTOKD_EMULATION_SCHEDULE": schedule}
        result = subprocess.run([program], env=environment, capture_output=True, text=True, check=False, timeout=120)
        output += result.stdout + result.stderr
        passed = passed and result.returncode == 0
    return passed, output


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """The objects of the unchanged kernels, for one check or the other; they pass it."""
    made = {}

    def objects(check):
        if check not in made:
            folder = tmp_path_factory.mktemp(check)
            made[check] = {name: folder / f"{name}.o" for name in OBJECTS}
            for name, output in made[check].items():
                compile_object(ROOT, name, check, output)
            passed, output = run_tests(folder, list(made[check].values()), check)
            assert passed, output
        return made[check]

    return objects


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_broken_kernel_is_found(unchanged, tmp_path, mutation):
    objects = {} if mutation.object == PARTS else unchanged(mutation.check)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    file = tmp_path / "csrc/cuda" / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file} has {text.count(mutation.old)} times: {mutation.old}"
    file.write_text(text.replace(mutation.old, mutation.new))
    changed = tmp_path / "changed.o"
    compile_object(tmp_path, mutation.object, mutation.check, changed)
    passed, output = run_tests(tmp_path, list({**objects, mutation.object: changed}.values()), mutation.check)
    assert not passed
    assert mutation.said in output
