# Every target makes the virtual environment first, from locked versions, if there is none.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test check format lock clean

demo: $(READY)          ## train Attamba and a transformer on Python's own source, compare, report
	$(BIN)/attamba demo

test: check             ## lint, format, types, tests
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

# One torch line for every platform: pip picks the build, and a CUDA build its own companions,
# triton among them. Beside a CPU build any triton serves: kernels then run in its interpreter.
lock:                   ## resolve requirements.lock anew (needs uv)
	uv pip compile pyproject.toml requirements.in --all-extras --universal --python-version 3.10 \
		--no-annotate --no-header $(UV_FLAGS) \
		| grep -vE '^(nvidia-|cuda-|triton|torch==)' > requirements.lock.new
	echo 'torch==2.13.0' >> requirements.lock.new
	echo "triton>=3.6,<4 ; sys_platform == 'linux' and platform_machine == 'x86_64'" >> requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
