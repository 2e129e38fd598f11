"""How configurations of Triton's update kernels are chosen and kept, with invented times instead of a GPU.

That no configuration changes a bit, and that each compiles, is tested in test_triton.py.
"""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from .device import DEVICE

tuning = pytest.importorskip("dtokd_kernels.triton.tuning", reason="triton is not installed")

KERNEL = SimpleNamespace(__name__="adamw_kernel")
FASTEST = tuning.CONFIGS[2]
CHUNK = tuning.CHUNK


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is not there: its name, its times, whether it captures, and how often it was timed."""
    gpu = SimpleNamespace(name="A100", milliseconds=[4.0, 3.0, 1.0, 2.0], capturing=False, measured=0, triton="3.8.0")

    def measure(*args):
        gpu.measured += 1
        if gpu.milliseconds is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gpu.milliseconds

    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(tuning, "machine", lambda device: {"device": gpu.name, "triton": gpu.triton})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("DTOKD_AUTOTUNE", raising=False)
    gpu.restart = lambda: monkeypatch.setattr(tuning, "_chosen", {})
    gpu.restart()
    gpu.files = lambda: [path for path in tmp_path.rglob("*") if path.is_file()]
    return gpu


def choose(elements=tuning.ENOUGH, dtype=torch.float32, K=2, **flags):
    table = tuning.Table(torch.zeros(8, 1, dtype=torch.int64), 1, 1, elements, False, False)
    return tuning.choose(None, table, dtype, (), KERNEL, K, **flags)


def test_the_fastest_is_chosen_and_remembered(gpu):
    assert choose() == FASTEST
    gpu.milliseconds = [1.0, 2.0, 2.0, 2.0]
    assert choose() == FASTEST
    assert gpu.measured == 1


def test_a_later_process_reads_the_choice(gpu):
    assert choose() == FASTEST
    assert len(gpu.files()) == 1  # nothing but the choice: what it was written to first is gone
    gpu.restart()
    gpu.milliseconds = [1.0, 2.0, 2.0, 2.0]
    assert choose() == FASTEST
    assert gpu.measured == 1


@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"K": 3}, {"AMSGRAD": True}], ids=["dtype", "K", "flag"])
def test_another_variant_is_tuned_by_itself(gpu, other):
    choose(**{"AMSGRAD": False})
    gpu.milliseconds = [2.0, 2.0, 2.0, 1.0]
    assert choose(**{"AMSGRAD": False, **other}) == tuning.CONFIGS[3]
    assert choose(**{"AMSGRAD": False}) == FASTEST


def test_nearby_numbers_of_objectives_share_a_choice(gpu):
    assert choose(K=3) == choose(K=4) == FASTEST
    assert gpu.measured == 1


@pytest.mark.parametrize("what", ["name", "triton"])
def test_another_gpu_or_triton_is_tuned_by_itself(gpu, what):
    choose()
    gpu.restart()
    setattr(gpu, what, "another")
    gpu.milliseconds = [1.0, 2.0, 2.0, 2.0]
    assert choose() == tuning.DEFAULT
    assert gpu.measured == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "\ud800", '{"config": [4]}', '{"config": [4, 2], "variant": {}}', "{'config': 3}"]
)
def test_a_file_that_says_nothing_is_ignored(gpu, text):
    choose()
    [file] = gpu.files()
    file.write_bytes(text.encode(errors="surrogatepass"))
    gpu.restart()
    assert choose() == FASTEST
    assert gpu.measured == 2
    gpu.restart()  # and the file is whole again
    assert choose() == FASTEST
    assert gpu.measured == 2


def test_a_configuration_that_is_no_longer_there_is_ignored(gpu):
    choose()
    [file] = gpu.files()
    file.write_text(file.read_text().replace("[4, 2]", "[4, 64]"))
    gpu.restart()
    assert choose() == FASTEST
    assert gpu.measured == 2


def test_a_disk_that_takes_nothing(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    assert choose() == choose() == FASTEST
    assert gpu.measured == 1


def test_small_updates_are_not_tuned(gpu):
    assert choose(elements=tuning.ENOUGH - 1) == tuning.DEFAULT
    assert gpu.measured == 0


def test_a_capture_does_not_tune_but_takes_what_was_chosen(gpu):
    gpu.capturing = True
    assert choose() == tuning.DEFAULT
    gpu.capturing = False
    assert choose() == FASTEST
    gpu.capturing = True
    assert choose() == FASTEST
    assert gpu.measured == 1


def test_switched_off(gpu, monkeypatch):
    choose()
    monkeypatch.setenv("DTOKD_AUTOTUNE", "0")
    assert choose() == tuning.DEFAULT
    assert choose(K=8) == tuning.DEFAULT
    assert gpu.measured == 1


def test_the_interpreter_does_not_tune(gpu, monkeypatch):
    monkeypatch.setattr(tuning, "INTERPRETED", True)
    assert choose() == tuning.DEFAULT
    assert gpu.measured == 0


def test_where_memory_is_short_the_default_stays(gpu):
    gpu.milliseconds = None
    assert choose() == choose() == tuning.DEFAULT
    assert gpu.measured == 1
    assert not gpu.files()  # a later process, with more of it, may tune


@pytest.fixture
def small(monkeypatch):
    """Launches that are timed are small ones, and last one after the other 1, 2, ... ms."""
    milliseconds = iter(range(1, 5))
    monkeypatch.setattr(tuning, "PROGRAMS", 2)
    monkeypatch.setattr(tuning, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(tuning, "_milliseconds", lambda run: run() or next(milliseconds))


def test_tensors_made_for_measuring_are_of_one_group(small):
    """A row of groups is no row of addresses, and step counters are no row of numbers."""
    table = tuning.table_of([[torch.ones(3), torch.ones(3)]] * 4, [torch.ones(()), torch.ones(())], groups=(0, 7))
    launched = []
    tuning.measure(lambda config, scratch, args: launched.append(scratch), table, torch.float32, ())
    assert all(scratch.numbers.shape[0] == table.numbers.shape[0] for scratch in launched)
    assert [int(scratch.numbers[-1, 0]) for scratch in launched] == [0] * len(tuning.CONFIGS)


def read(address, dtype, count):
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(int(address)), dtype=dtype)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="reads memory at its address")
@pytest.mark.parametrize("step", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_numbers_made_for_measuring_are_ordinary(small, dtype, step):
    """And the same for every process; the random state of the caller is not touched."""
    table = tuning.table_of([[torch.ones(3, dtype=dtype)]] * 4, [torch.ones((), dtype=step)])
    seen = []

    def launch(config, scratch, args):
        *addresses, counter = scratch.numbers[3:, 0]
        seen.append(torch.stack([read(a, dtype, scratch.elements) for a in addresses]).clone())
        assert len(set(addresses)) == 4
        assert read(counter, step, 1) == 0

    before = torch.get_rng_state()
    tuning.measure(launch, table, dtype, ())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(lists, seen[0]) for lists in seen)
    assert ((seen[0] >= 0.5) & (seen[0] <= 1.5)).all()
    assert (seen[0].double().std(1) > 0.25).all()
    assert not torch.equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize(("dtype", "lists", "programs"), [(torch.float32, 5, 2048), (torch.bfloat16, 2, 10240)])
def test_measured_is_more_than_a_wave_and_a_cache(monkeypatch, dtype, lists, programs):
    """Few lists of short numbers have more programs; many have the memory that docs/gpu.md names, or more."""
    made = SimpleNamespace(add_=lambda number: SimpleNamespace(unbind=lambda: [torch.empty(CHUNK)] * lists))
    sizes = []
    monkeypatch.setattr(tuning.torch, "rand", lambda rows, size, **_: sizes.append((rows, size)) or made)
    monkeypatch.setattr(tuning, "_milliseconds", lambda run: 1.0)
    table = tuning.table_of([[torch.ones(3, dtype=dtype)]] * lists, [torch.ones(())], groups=(0,))
    tuning.measure(lambda *args: None, table, dtype, ())
    assert sizes == [(lists, programs * CHUNK)]
    assert lists * programs * CHUNK * dtype.itemsize == 320 * 2**20


def test_the_time_of_a_launch_is_the_median_of_those_after_the_first(monkeypatch):
    now = [0.0]
    events = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = now[0]
            events.append(self)

        def elapsed_time(self, end):
            return end.time - self.time

        def synchronize(self):
            assert self is events[-1]

    durations = iter([1000.0] + [5.0] * (tuning.WARM - 1) + [2.0, 1.0, 9.0] * tuning.TIMED)

    def run():
        now[0] += next(durations)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert tuning._milliseconds(run) == 2
    assert len(events) == tuning.TIMED + 1


def test_measured_is_all_the_work_and_none_of_the_callers_tensors(small):
    """A coefficient of 0 or a skipped step, as the caller's may be, would leave work out."""
    tensors = [[torch.ones(3)] for _ in range(4)]
    zero, skipped = torch.tensor([0.0, 1.0]).double(), torch.tensor(True)
    table = tuning.table_of(tensors)
    launched = []

    def launch(config, scratch, args):
        launched.append(config)
        assert (scratch.numbers.shape, scratch.elements) == (table.numbers.shape, 2 * CHUNK)
        assert not {int(a) for a in scratch.numbers[3:].flatten()} & {row[0].data_ptr() for row in tensors}
        coefficients, is_skipped, lr = args
        assert (coefficients != 0).all()
        assert coefficients.dtype == torch.float64
        assert not is_skipped
        assert lr == 0.1

    assert tuning.measure(launch, table, torch.float32, (zero, skipped, 0.1)) == [1, 2, 3, 4]
    assert launched == list(tuning.CONFIGS)
    assert zero.tolist() == [0.0, 1.0]
    assert skipped
