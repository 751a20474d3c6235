PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= peft=lora_r8 chat_template=chatml trainer.max_steps=200 trainer.per_device_train_batch_size=4
ARGS ?=
# One file a worker, so that what a file's tests share is made once; in the order that tests/conftest.py gives.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 8

.DEFAULT_GOAL := help
.PHONY: help demo test check test-all bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nEach target makes or refreshes %s when pyproject.toml or constraints.txt changed.\n' '$(VENV)'
	@printf 'DEMO="OVERRIDES" changes the demo; ARGS="..." goes to pytest, or to the bench; PYTHON=python3.x picks the interpreter.\n'

demo: $(VENV)/.stamp ## a short fine-tuning on this machine, start to end
	$(BIN)/python -m sft_lab $(DEMO)

test: $(VENV)/.stamp ## the tests, without the slow ones
	$(PYTEST) $(ARGS)

check: $(VENV)/.stamp ## lint, format, types and the quick tests (none that trains through the command line)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not gpu and not e2e" $(ARGS)

# Without what the plugin asks for: boto3 and an old cloudpickle, which only its AWS part imports.
test-all: $(VENV)/.stamp ## every test that needs no GPU
	$(BIN)/python -m pip install -qq -c constraints.txt ray
	$(BIN)/python -m pip install -qq -c constraints.txt --no-deps hydra-ray-launcher
	$(BIN)/python -m pip install -qq -c constraints.txt --no-build-isolation 'sft-lab[deepspeed]'
	@DS_ACCELERATOR=cpu $(BIN)/python -c \
		'import deepspeed, submitit; from hydra_plugins import hydra_ray_launcher, hydra_submitit_launcher' || \
		{ echo 'make test-all: what cannot be imported cannot be tested' >&2; exit 1; }
	$(PYTEST) -m "not gpu" $(ARGS)

bench: $(VENV)/.stamp ## measurements, side by side (ARGS=NAME for one of them)
	$(BIN)/python -m tests.bench $(ARGS)

clean: ## remove .venv, build results and caches; outputs/ stays
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
	find sft_lab tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): about a minute the first time"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@
