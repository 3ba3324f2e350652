# `make demo` and `make test` need Python 3.11+ and make, nothing else: the first call builds .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install demo train test test-quantized test-unit test-network check golden clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hub_moe needs Python 3.11 or newer: make PYTHON=python3.13 ...")'
	@echo "Installing hub_moe into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[plot,test]'
	@touch $@

install: $(VENV)/.installed  ## only build .venv

demo: $(VENV)/.installed  ## the whole loop on an embedded Hub: publish, propose, review, merge, use; offline
	$(BIN)/hub-moe demo

train: demo  ## fine-tune the demo's model by each method of evals/recipes: a patch, an adapter, models
	for method in experts lora full pretrain; do $(BIN)/hub-moe train evals/recipes/$$method.toml || exit 1; done

test: $(VENV)/.installed  ## every test
	$(BIN)/python -m pytest -n 2
	@$(MAKE) --no-print-directory test-quantized

# torchao lies beside the environment, not in it: transformers and peft import it wherever they find it, and then every
# program starts later, with some lines about GPU libraries that it cannot load.
$(VENV)/quantized/.installed: $(VENV)/.installed
	$(PIP_INSTALL) --no-deps --target $(@D) torchao
	@touch $@

test-quantized: $(VENV)/quantized/.installed  ## experts in 8 and 4 bits, which the other tests skip
	PYTHONPATH=$(abspath $(VENV)/quantized) $(BIN)/python -m pytest -n 2 tests/experts/test_quantized.py

test-unit: $(VENV)/.installed  ## the fast tests
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-network: $(VENV)/.installed  ## the tests that need the public Hub
	$(BIN)/python -m pytest -m network

check: $(VENV)/.installed  ## format, lint and types, as CI runs them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

golden: $(VENV)/.installed  ## rewrite the committed help texts and reference cards after a deliberate change
	$(BIN)/python -m pytest tests/cli/test_help.py tests/cards/test_reference_cards.py --update-golden -q

clean:
	rm -rf $(VENV) build dist *.egg-info
