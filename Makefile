# What a newcomer needs: `make run`, `make test`. All of it works from an empty checkout, as root or not.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.14 python3,$(if $(shell command -v $(p)),$(p))))
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv run demo test lint bench chaos sanitize clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt proxy/_fastpath.pyx proxy/_decide.pxd proxy/_thread.pxd
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dfproxy needs Python 3.11 or later: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,demo,dev]'
	touch $@

run: venv
	$(BIN)/dfproxy serve

demo: venv
	$(BIN)/dfproxy demo

test: venv
	$(BIN)/python -m pytest -n 3 --dist worksteal

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy

# make bench OF=monitoring: the functions that look at workflows, with a million of them (minutes, and 2 GB of disk)
bench: venv
	$(BIN)/python -m bench$(if $(OF),.$(OF))

# Longer: make chaos SECONDS=600
SECONDS ?= 20
chaos: venv
	$(BIN)/python -m tests.chaos --seconds $(SECONDS)

# The compiled part, looked through by gcc's sanitizers while its tests run: two minutes.
sanitize: venv
	tests/sanitize.sh

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
