PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

# Tests start many processes: what one has compiled the others read.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: check test test-all slow hostile crash mutants lint types format

check: lint types test

# A file in one process, as what its tests share is made once, in the order of names, since the longest files have the
# fewest tests; more than four processes would want too much memory.
PARALLEL = -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Without what pyproject.toml leaves out: slow tests, all of the hostile inputs, and searches cut off at every write.
test:
	$(PYTHON) -m pytest $(PARALLEL)

test-all: test slow hostile crash mutants

slow:
	$(PYTHON) -m pytest -m "slow and not hostile and not crash" $(PARALLEL)

# A part of what a crash or a failing disk may leave, in an order that a seed decides, and kills under Ray.
crash:
	$(PYTHON) -m pytest -m crash -s tests/crash

# 100 wrong changes of the core at random: at least 95% must be found.
mutants:
	$(PYTHON) -m benchmarks.reliability.mutants

# Every hostile input, with counts by area and command; `--part 1/8` or `--record FILE --stop-after 480` takes fewer at once.
hostile:
	$(PYTHON) -m tests.hostile

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
