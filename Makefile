# The front door. `make` alone prints what there is.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= out/demo
SHELL  := /bin/bash
.DEFAULT_GOAL := help

.PHONY: help setup demo demo-remote stream test lint evaluate bench bench-model bench-remote docs lock clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.done ## Make .venv with all that is needed; the command is .venv/bin/chatflow

# Installed as locked, with hashes; uv comes from the package index where it is missing.
$(VENV)/.done: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "chatflow needs Python 3.11 or newer; try make PYTHON=python3.12 setup"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if command -v uv >/dev/null; then uv=uv; else \
	  $(BIN)/python -m pip install -q uv && uv=$(BIN)/uv; fi; \
	  echo "installing the locked packages into $(VENV)" && \
	  $$uv pip install -q --python $(BIN)/python --no-deps --require-hashes -r requirements.lock && \
	  $$uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

demo: setup ## Analyse the sample chats with the embedded Gemma, and show the results
	$(BIN)/chatflow run --input samples/chats.jsonl --output $(OUT)

# The stand-in refuses and breaks some calls, as real services do.
demo-remote: setup ## The same with a remote model: Gemini's client against a stand-in on loopback
	$(BIN)/python -m tests.fakes --latency lognormal:0.3,0.5 --retry_after 1 \
	  --rates 429=0.1,503=0.02,reset=0.02,malformed=0.02,nonsense=0.05,safety=0.02 -- \
	  $(BIN)/chatflow run --input samples/chats.jsonl --output out/demo-remote \
	  --inference remote --model gemini-2.5-flash --project demo --location us-central1 \
	  --api_endpoint {address}

stream: setup ## Run the event-driven system with live messages, on the Pub/Sub emulator
	$(BIN)/chatflow stream --chats samples/chats.jsonl

test: setup ## Run all tests
	$(BIN)/pytest

lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

evaluate: setup ## Measure the sentiment on the labelled sample chats
	$(BIN)/chatflow evaluate samples/chats.jsonl

bench: setup ## Measure the stream: events a second, latency, Beam's runner beside ours
	$(BIN)/python bench/stream.py

bench-model: setup ## Measure the model on this machine, beside keras_hub, llama.cpp and others
	$(BIN)/python bench/model.py

bench-remote: setup ## Measure the remote path beside Beam's own handlers, on the stand-in
	$(BIN)/python bench/remote.py

docs: setup ## Write the README's table of options anew
	$(BIN)/python tests/test_docs.py

lock: setup ## Resolve the dependencies anew into requirements.lock
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header \
	  --no-annotate --extra dev pyproject.toml -o requirements.lock

clean: ## Remove what the targets made; the model stays in its cache
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
