# Two commands do everything from a fresh clone: `make demo` and `make test`. Both first make .venv (Python 3.11+).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# mamba-ssm built without CUDA, for the test that interprets its kernels on the CPU; sees the packages of .venv
KERNELS := .venv-kernels
FILM ?=
QUICK ?=
TEST_FLAGS := --numprocesses 3 --no-loadscope-reorder --durations=15
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED := 0
# set where images are built, it has every one of the many processes compile what it imports
export PYTHONDONTWRITEBYTECODE :=
# Ray finds its own programs, and starts workers, through PATH
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo bench test test-slow test-exhaustive coverage check format env clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "need Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	@echo "installing into $(VENV) (about two minutes)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: env
	@$(BIN)/python jobs/demo.py $(if $(FILM),--film '$(FILM)') $(if $(QUICK),--quick)

# every suite of jobs/benchmark.py that this machine can run, hours on two cores; rewrites the tables of docs/benchmarks.md
bench: env
	@$(BIN)/python jobs/benchmark.py all --record docs/benchmarks.md $(if $(FILM),--film '$(FILM)')

test: check
	@$(BIN)/python -m pytest $(TEST_FLAGS)

# the tests again, in a third more time: every process that they start is traced
coverage: env
	@$(BIN)/python -m coverage erase
	@$(BIN)/python -m coverage run -m pytest $(TEST_FLAGS)
	@find . -maxdepth 1 -name '.coverage.*' -size 0 -delete  # processes that tests killed leave empty files
	-@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report --fail-under=85

check: env
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# what takes minutes and is not the only guard of its behaviour; after `make test`
test-slow: env $(KERNELS)/.installed
	@$(BIN)/python -m pytest $(TEST_FLAGS) -m 'slow and not gpu and not exhaustive'

# every combination that test-slow draws from; hours
test-exhaustive: env $(KERNELS)/.installed
	@$(BIN)/python -m pytest $(TEST_FLAGS) -m 'exhaustive and not gpu'

$(KERNELS)/.installed: $(STAMP)
	@echo "installing mamba-ssm's kernels into $(KERNELS)"
	@$(PYTHON) -m venv --clear --without-pip $(KERNELS)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(echo $(KERNELS)/lib/python*/site-packages)/venv.pth"
	@MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(BIN)/python -m pip --python $(KERNELS)/bin/python install --quiet \
	    --disable-pip-version-check --no-deps --no-build-isolation triton==3.7.1 wheel==0.48.0 mamba-ssm==2.3.2.post1
	@touch $@

format: env
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf outputs .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*
