# make demo   environment in .venv, build, then the main job on real photographs
# make test   environment if missing, build, all tests
# make proofs every Triton configuration and CUDA kernel on every architecture
# make bench  measures this machine; results in benches/results
# make gpu    on a machine with a GPU and a torch of its own: build, test, measure, without a network
# make gpu-rehearsal  the same on the CPU, so that no minute on a GPU goes to a typing error
# make gpu-static     every GPU kernel as its compiler sees it, compared with benches/static; no GPU needed
# make check  ruff, mypy, clang-format
# make clean

PYTHON ?= python3
VENV ?= .venv
# Without a Triton that pip can install (or to try that): make test EXTRAS=demo,test,bench
EXTRAS ?= triton,demo,test,bench,dev
ARGS ?=
# Tests run in as many processes as there are cores, at most this many (more gain little, and each loads torch).
WORKERS ?= 4

BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses $(WORKERS) --dist worksteal
SOURCES = $(shell find csrc -type f)

.PHONY: demo test proofs bench gpu gpu-rehearsal gpu-static check format clean

demo: $(VENV)/.built
	$(BIN)/python -m fastssl demo $(ARGS)

test: $(VENV)/.built
	$(PYTEST) -m "not proof" $(ARGS)

proofs: $(VENV)/.built
	$(PYTEST) -m proof $(ARGS)

bench: $(VENV)/.built
	mkdir -p build
	$(BIN)/python -m pytest benches -q --disable-warnings --show-capture=no --benchmark-quiet \
	    --benchmark-json=build/benchmark.json $(ARGS)

gpu:
	$(PYTHON) benches/gpu.py $(ARGS)

gpu-rehearsal: $(VENV)/.built
	$(BIN)/python benches/gpu.py --rehearse --deadline 900 $(ARGS)

gpu-static: $(VENV)/.built
	$(BIN)/python benches/gpu_static.py $(ARGS)

check: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) tests/*.cpp tests/*.h

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) tests/*.cpp tests/*.h

# torch comes first and alone: the build needs it, and constraints.txt says which.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools ninja pybind11
	touch $@

# Installs what pyproject.toml asks for beside torch, and builds the native part in place.
$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -c constraints.txt \
	    -e '.[$(EXTRAS)]' > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks fastssl/_C*.so fastssl/_build.json
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
