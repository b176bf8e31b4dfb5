PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.PHONY: check test test-all crash lint types format

check: lint types test

# A file in one process, as what its tests share is made once, in the order of names, since the longest files have the
# fewest tests; more than four processes would want too much memory.
PARALLEL = -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Without the slow tests, which pyproject.toml leaves out.
test:
	$(PYTHON) -m pytest $(PARALLEL)

test-all:
	$(PYTHON) -m pytest -m "" $(PARALLEL)

# A part of what a crash or a failing disk may leave, in an order that a seed decides; `test-all` has it too.
crash:
	$(PYTHON) -m pytest -m crash -s tests/crash

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
