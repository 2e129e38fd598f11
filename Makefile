# Two commands: `make demo` and `make test`. Each sets up all it needs in .venv, from nothing but Python and a C++
# compiler; later calls find it there.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/pip --disable-pip-version-check --quiet
CSRC = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.txt')

.PHONY: demo test bench lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	$(BIN)/dtokd demo $(DEMO)

test: $(VENV)/test
	DTOKD_REQUIRE_NATIVE=1 $(BIN)/python -m pytest $(TEST)

bench: $(VENV)/test
	$(BIN)/python -m benchmarks.run $(BENCH)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter-out %.txt,$(CSRC))

clean:
	rm -rf $(VENV) build *.egg-info dtokd_kernels/_C*

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
	$(PIP) install --no-build-isolation -e '.[test]'
	touch $@

$(VENV)/lint: $(VENV)/test
	$(PIP) install --no-build-isolation -e '.[lint]'
	touch $@
