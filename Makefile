PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.PHONY: check test test-all lint types format

check: lint types test

# Without the slow tests, which pyproject.toml leaves out.
test:
	$(PYTHON) -m pytest

test-all:
	$(PYTHON) -m pytest -m ""

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
