# Every target makes the virtual environment first, from locked versions, if there is none.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.ready-dev

# Tests start many processes: each would compile all that it imports, where this is set.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check docs format lock clean

demo: $(READY)          ## train Attamba and a transformer on Python's own source, compare, report
	$(BIN)/attamba demo

# A process for each core, one thread in each; a file's tests stay together, for their fixtures.
# Files are handed out as tests/conftest.py sorts them: first those that take minutes.
test: check docs        ## lint, format, types, documentation, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DEV)            ## the documentation's site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pip would compile every module of every package, which takes longer than the rest. Python keeps
# what it compiles of those that are used.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

$(DEV): $(READY) requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.lock
	touch $(DEV)

# One torch line for every platform: pip picks the build, and a CUDA build its own companions,
# triton among them. Beside a CPU build any triton serves: kernels then run in its interpreter.
RESOLVE = uv pip compile pyproject.toml requirements.in --universal --python-version 3.10 \
	--no-annotate --no-header $(UV_FLAGS)
OPEN    = grep -vE '^(nvidia-|cuda-|triton|torch==)'

lock:                   ## resolve both locks anew (needs uv)
	$(RESOLVE) --extra train --extra plot | $(OPEN) > requirements.lock.new
	echo 'torch==2.13.0' >> requirements.lock.new
	mv requirements.lock.new requirements.lock
	$(RESOLVE) --all-extras -c requirements.lock | $(OPEN) > requirements-dev.lock.new
	echo 'torch==2.13.0' >> requirements-dev.lock.new
	echo "triton>=3.6,<4 ; sys_platform == 'linux' and platform_machine == 'x86_64'" \
		>> requirements-dev.lock.new
	mv requirements-dev.lock.new requirements-dev.lock

clean:
	rm -rf $(VENV) runs site .mypy_cache .ruff_cache .pytest_cache .hypothesis
