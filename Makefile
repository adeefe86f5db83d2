# `make` alone prints the list of targets. DRY_RUN=1 prints the commands of a target.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LINT   := .venv-lint/bin
OUT    ?= out/demo
DATABASE ?= sqlite:///out/chatflow.db
REPLIES ?= out/replies.jsonl
LABELLED ?= samples/chats.jsonl
SHELL  := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules $(if $(filter-out 0,$(DRY_RUN)),--dry-run)

# For Google Cloud: set on the command line, in the environment, or in settings.mk (see
# infra/settings.mk.example). The names are those that infra/terraform creates.
-include settings.mk

comma := ,
ifeq ($(origin NAME),environment)
NAME := chatflow# what some systems call the machine
endif
NAME       ?= chatflow
INFERENCE  ?= on_worker
MODEL      ?= $(if $(filter remote,$(INFERENCE)),gemini-2.5-flash,gemma3-270m)
GPU        ?=
WORKERS    ?= 3
WEIGHTS    ?= inside
TAG        ?= $(shell git describe --always --dirty 2>/dev/null || echo latest)
BUCKET     ?= $(PROJECT)-$(NAME)
REPOSITORY ?= $(REGION)-docker.pkg.dev/$(PROJECT)/$(NAME)
SUBNETWORK ?= regions/$(REGION)/subnetworks/$(NAME)
DATASET    ?= $(PROJECT).$(subst -,_,$(NAME))
INPUT      ?= projects/$(PROJECT)/subscriptions/$(NAME)-events
TEMPLATE   ?=
ARGS       ?=
SIZE_ARGS  ?=
# Remove the spaces that make keeps before a comment.
$(foreach name,PROJECT REGION NAME INFERENCE MODEL GPU WORKERS WEIGHTS TAG BUCKET REPOSITORY \
  SUBNETWORK DATASET INPUT PRESETS,$(eval override $(name) := $(strip $($(name)))))

# Each kind of model and hardware has its own image.
VARIANT     := $(strip $(if $(filter remote,$(INFERENCE)),remote,$(if $(filter vllm:%,$(MODEL)),vllm,\
  $(if $(filter torch:%,$(MODEL)),torch$(if $(GPU),-gpu),$(if $(GPU),gpu,cpu)))))
IN_IMAGE    := $(if $(filter cpu gpu,$(VARIANT))$(PRESETS),$(WEIGHTS),none)
MODEL_IMAGE := $(REPOSITORY)/model:$(VARIANT)-$(IN_IMAGE)
IMAGE       ?= $(REPOSITORY)/pipeline:$(TAG)-$(VARIANT)
TEMPLATES   := gs://$(BUCKET)/templates

# Files are read as a batch, with results in files; a subscription as a stream, with results in
# topics and tables.
TOPIC  := projects/$(PROJECT)/topics/$(NAME)
STREAM := $(findstring /subscriptions/,$(INPUT))$(findstring /topics/,$(INPUT))
OUTPUT ?= gs://$(BUCKET)/results/$(shell date +%Y-%m-%dT%H%M%S)
SINKS  := $(if $(STREAM),\
  --analyses=$(TOPIC)-analyses$(comma)bigquery://$(DATASET).analyses \
  --drafts=$(TOPIC)-drafts$(comma)bigquery://$(DATASET).drafts \
  --dead_letters=$(TOPIC)-dead-letters$(comma)bigquery://$(DATASET).dead_letters,\
  --output=$(OUTPUT))

# A batch has another name, because it may run at the same time as the stream.
JOB_NAME ?= $(NAME)$(if $(STREAM),,-batch)
JOB := --runner=DataflowRunner --project=$(PROJECT) --region=$(REGION) --job_name=$(JOB_NAME) \
  --temp_location=gs://$(BUCKET)-temp/temp --staging_location=gs://$(BUCKET)/staging \
  --service_account_email=$(NAME)-worker@$(PROJECT).iam.gserviceaccount.com \
  --subnetwork=$(SUBNETWORK) --no_use_public_ips --max_num_workers=$(WORKERS) \
  --disk_size_gb=$(if $(GPU),100,50) --sdk_container_image=$(IMAGE) --labels=app=$(NAME) \
  $(if $(DATAFLOW_ENDPOINT),--dataflow_endpoint=$(DATAFLOW_ENDPOINT)) \
  --inference=$(INFERENCE) --model=$(MODEL) --input='$(INPUT)' $(SINKS)

# Machines, hints and threads that fit the model; ARGS override them.
CHATFLOW = $(if $(PRESETS),CHATFLOW_PRESETS=$(PRESETS)) $(BIN)/chatflow
FIT = fitted=$$($(CHATFLOW) size --inference=$(INFERENCE) --model=$(MODEL) \
  $(if $(GPU),--accelerator=$(GPU)) $(SIZE_ARGS) --summary=flags) &&
RUN = $(CHATFLOW) run $(JOB) $$fitted $(ARGS)

# The running job of this name, or the newest, as $$job.
PLACE  := --project=$(PROJECT) --region=$(REGION)
LIST   := gcloud dataflow jobs list $(PLACE) --filter='name~^$(JOB_NAME)$$' --format='value(id)' \
  --sort-by=~creationTime --limit=1
IS_ONE := && { test -n "$$job" || { echo 'no job named $(JOB_NAME) in $(REGION) of $(PROJECT)'; exit 1; }; } &&
FIND   := job=$$($(LIST) --status=active) $(IS_ONE)
NEWEST := job=$(or $(JOB_ID),$$($(LIST))) $(IS_ONE)

NEEDS_CLOUD := image push template deploy update drain cancel logs status infra-plan infra-apply
$(foreach goal,$(filter $(NEEDS_CLOUD),$(MAKECMDGOALS)),$(foreach name,PROJECT REGION,$(if \
  $($(name)),,$(error $(name) is missing: make $(goal) $(name)=…, or set it in settings.mk))))

.PHONY: help setup setup-torch setup-dev demo demo-remote stream test test-fast lint evaluate eval bench bench-stream bench-model bench-remote \
  console docs docs-serve screenshots lock clean wheel $(NEEDS_CLOUD)

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile
	@echo '  Google Cloud: PROJECT= REGION= are needed; INFERENCE=on_worker|remote MODEL= GPU=nvidia-l4'
	@echo '  WORKERS= INPUT= NAME= and others have defaults; DRY_RUN=1 prints the commands.'

setup: $(VENV)/.done ## Make .venv with what runs; the command is .venv/bin/chatflow

setup-torch: $(VENV)/.torch ## Add PyTorch to it, for torch: models

setup-dev: $(VENV)/.dev ## Add all that tests, linters, benches and docs need, PyTorch too

# Installs the packages of a lock file into an environment, with checked hashes; installs uv from
# the package index if it is missing.
define INSTALL
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@if command -v uv >/dev/null; then uv=uv; else \
	  $(1)/bin/python -m pip install -q uv && uv=$(1)/bin/uv; fi; \
	  echo "installing the locked packages into $(1)" && \
	  $$uv pip install -q --python $(1)/bin/python --no-deps --require-hashes -r $(2)$(3)
	@touch $@
endef

# PyTorch's build for CPUs. If its index cannot be reached, pip takes the larger build of the package
# index, or a local file (PIP_FIND_LINKS).
TORCH := torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# One environment that grows: chatflow does not import what only development has.
$(VENV)/.done: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "chatflow needs Python 3.11 or newer; try make PYTHON=python3.12 setup"; exit 2; }
	$(call INSTALL,$(VENV),requirements.lock, && \
	  $$uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .)

$(VENV)/.torch: infra/docker/requirements-torch.lock $(VENV)/.done
	$(call INSTALL,$(VENV),$<, && \
	  $(BIN)/python -m pip install -q --retries 0 --extra-index-url $(TORCH_INDEX) $(TORCH))

$(VENV)/.dev: requirements-dev.lock $(VENV)/.torch
	$(call INSTALL,$(VENV),$<)

demo: setup ## Analyse the sample chats with the embedded Gemma, and show the results
	@mkdir -p out
	$(BIN)/chatflow run --input samples/chats.jsonl --output $(OUT) --database '$(DATABASE)'

# The stand-in refuses and breaks some calls, as real services do.
demo-remote: setup ## The same with a remote model: Gemini's client against a stand-in on loopback
	$(BIN)/python -m tests.fakes --latency lognormal:0.3,0.5 --retry_after 1 \
	  --rates 429=0.1,503=0.02,reset=0.02,malformed=0.02,nonsense=0.05,safety=0.02 -- \
	  $(BIN)/chatflow run --input samples/chats.jsonl --output out/demo-remote \
	  --inference remote --model gemini-2.5-flash --project demo --location us-central1 \
	  --api_endpoint {address}

stream: setup ## Run the event-driven system with live messages, on the Pub/Sub emulator
	$(BIN)/chatflow stream --chats samples/chats.jsonl

console: setup ## Serve the staff's page for DATABASE= (default: sqlite:///out/chatflow.db)
	@mkdir -p out
	$(BIN)/chatflow console --database '$(DATABASE)' --replies '$(REPLIES)' $(ARGS)

# Python keeps bytecode, so that the many processes of the tests do not compile it again.
test: setup-dev ## Run all tests, in three processes
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest -n 3 --dist loadfile

test-fast: setup-dev ## Run the tests that need no real model, browser, emulator or server
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest -n 2 --dist loadfile --fast

lint: setup-dev .venv-lint/.done ## Check style, types, imports, images, scripts and Terraform
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(LINT)/lint-imports --no-logo
	$(LINT)/hadolint infra/docker/*.Dockerfile
	$(LINT)/shellcheck .ci/run
	$(LINT)/zizmor --offline --quiet .github
	$(BIN)/python docs/prose.py
	@if command -v terraform >/dev/null; then terraform fmt -check -diff -recursive infra/terraform; \
	  else echo 'terraform is missing: see https://developer.hashicorp.com/terraform/install'; \
	  test "$$CHATFLOW_REQUIRE_ALL" != 1; fi
	$(LINT)/checkov --directory infra --framework terraform dockerfile --compact --quiet \
	  --skip-download

# Not a part of lint: it asks the package index, and an advisory may appear without a change here.
# --strict, because without it a service that does not answer counts as no finding.
.PHONY: audit
audit: .venv-lint/.done ## Look up known vulnerabilities of the locked packages; needs pypi.org
	@for lock in requirements*.lock infra/docker/*.lock infra/lint.lock; do echo "$$lock:"; \
	  $(LINT)/pip-audit --strict --disable-pip --require-hashes -r $$lock || failed=1; done; \
	  test -z "$$failed"

.venv-lint/.done: infra/lint.lock
	$(call INSTALL,.venv-lint,infra/lint.lock)

evaluate: setup ## Measure tone, summaries and drafts on labelled chats: the samples, or LABELLED=
	$(BIN)/chatflow evaluate $(LABELLED)

eval: setup ## Check that prompts and model answer as well as before; the history is tuning/history.jsonl
	@mkdir -p out
	$(BIN)/chatflow evaluate tuning/eval.jsonl --history tuning/history.jsonl --report out/eval.html

bench: setup-dev ## Measure beside llama.cpp and the version before: first result, pipeline, model (half an hour)
	$(BIN)/python bench/machine.py
	$(BIN)/python bench/first_result.py
	$(BIN)/python bench/pipeline.py
	$(BIN)/python bench/model.py --sides 'llama.cpp, 4 bits;llama.cpp, 8 bits;chatflow;chatflow, int8'

bench-stream: setup-dev ## Measure the stream: events a second, latency, Beam's runner beside ours
	$(BIN)/python bench/stream.py

bench-model: setup-dev ## Measure the model on this machine, beside keras_hub, llama.cpp and others
	$(BIN)/python bench/model.py

bench-remote: setup-dev ## Measure the remote path beside Beam's own handlers, on the stand-in
	$(BIN)/python bench/remote.py

docs: setup-dev ## Write what is made from code (reference, template, table schemas); build out/site
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/make_site.py

docs-serve: docs ## Serve the documentation at http://127.0.0.1:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory out/site 8000

LOCK    = PATH="$(BIN):$$PATH" uv pip compile -q --python-version 3.11 --generate-hashes --no-header --no-annotate
COMPILE = $(LOCK) --universal
screenshots: setup-dev ## Take the README's pictures of the console again, with the real Gemma
	$(BIN)/python docs/screenshots.py

lock: setup ## Update the lock files: what runs, development, images and linters
	$(COMPILE) --extra dev pyproject.toml -o requirements-dev.lock
	$(COMPILE) -c requirements-dev.lock --extra gemma --extra console --extra build pyproject.toml -o requirements.lock
	$(COMPILE) -c requirements-dev.lock --extra gemma pyproject.toml -o infra/docker/requirements-cpu.lock
	$(COMPILE) -c requirements-dev.lock --extra gpu pyproject.toml -o infra/docker/requirements-gpu.lock
	$(COMPILE) -c requirements-dev.lock pyproject.toml -o infra/docker/requirements-remote.lock
	$(COMPILE) -c requirements-dev.lock --extra torch pyproject.toml -o infra/docker/requirements-torch.lock
	$(LOCK) --no-config --python-platform x86_64-manylinux_2_31 --extra vllm pyproject.toml \
	  -o infra/docker/requirements-vllm.lock
	$(COMPILE) infra/lint.in -o infra/lint.lock

wheel: setup ## Build the package into dist/
	rm -rf dist
	$(BIN)/hatchling build -t wheel

# Google Cloud, in the order of use.

TERRAFORM := terraform -chdir=infra/terraform
TF_VARS   := -var=project=$(PROJECT) -var=region=$(REGION) -var=name=$(NAME) \
  $(if $(filter remote,$(INFERENCE)),-var=remote_models=true) $(TF_ARGS)

infra-plan: ## Show what Terraform would create in the project
	$(TERRAFORM) init -input=false
	$(TERRAFORM) plan $(TF_VARS)

infra-apply: ## Create topics, buckets, tables, accounts, the image repository and alerts
	$(TERRAFORM) init -input=false
	$(TERRAFORM) apply $(TF_VARS)

ifeq ($(BUILD),cloud)
image: wheel
	gcloud builds submit --config=infra/cloudbuild.yaml $(PLACE) \
	  --service-account=projects/$(PROJECT)/serviceAccounts/$(NAME)-build@$(PROJECT).iam.gserviceaccount.com \
	  --gcs-source-staging-dir=gs://$(BUCKET)-temp/source \
	  --substitutions=_REPOSITORY=$(REPOSITORY),_TAG=$(TAG)-$(VARIANT),_ACCELERATOR=$(VARIANT),_WEIGHTS=$(or $(PRESETS),$(IN_IMAGE)) .
push: ; @echo 'BUILD=cloud: the images were pushed as they were built'
else
image: wheel ## Build the model image and the pipeline image, with Docker; BUILD=cloud: Cloud Build
	docker build --platform linux/amd64 -f infra/docker/model.Dockerfile --target $(if $(filter inside,$(IN_IMAGE)),model,bare) \
	  --build-arg ACCELERATOR=$(VARIANT) $(if $(PRESETS),--build-context weights=$(PRESETS)) -t $(MODEL_IMAGE) .
	docker build --platform linux/amd64 -f infra/docker/pipeline.Dockerfile --build-arg MODEL_IMAGE=$(MODEL_IMAGE) -t $(IMAGE) .

push: ## Push both images to the repository
	$(if $(findstring -dirty,$(IMAGE)),$(warning the image $(IMAGE) has changes that are not committed))
	docker push $(MODEL_IMAGE)
	docker push $(IMAGE)
endif

template: ## Write the Flex Template of the pushed image to the bucket
	gcloud dataflow flex-template build $(TEMPLATES)/$(NAME).json --project=$(PROJECT) \
	  --image=$(IMAGE) --sdk-language=PYTHON --metadata-file=infra/template/metadata.json

deploy: setup ## Start the job on Dataflow; TEMPLATE=1: from the template
	$(FIT) $(if $(TEMPLATE),$(BIN)/python infra/template/launch.py $(TEMPLATES)/$(NAME).json \
	  $(JOB) $$fitted $(ARGS),$(RUN) --no_wait_until_finish)

update: setup ## Replace the running stream with this version, if Dataflow finds it compatible
	$(FIND) true
	$(FIT) $(RUN) --update --dataflow_service_options=graph_validate_only --summary=json >/dev/null
	$(FIT) $(RUN) --update --no_wait_until_finish

drain: ## Let the running job finish what it has read, then end
	$(FIND) gcloud dataflow jobs drain $$job $(PLACE)

cancel: ## End the running job at once; open chats are forgotten
	$(FIND) gcloud dataflow jobs cancel $$job $(PLACE)

logs: ## Print warnings and errors of the last day, of the newest job or JOB_ID=
	$(NEWEST) gcloud logging read --project=$(PROJECT) --freshness=1d --limit=100 \
	  --format='value(timestamp,severity,jsonPayload.message,textPayload)' \
	  "resource.type=dataflow_step AND resource.labels.job_id=$$job AND severity>=WARNING"

status: ## Print the state of the newest job, or of JOB_ID=, and chatflow's counters
	$(NEWEST) gcloud dataflow jobs show $$job $(PLACE) && \
	  gcloud beta dataflow metrics list $$job --source=user $(PLACE)

clean: ## Remove what the targets made; the model stays in its cache
	rm -rf $(VENV) .venv-lint .cache out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
