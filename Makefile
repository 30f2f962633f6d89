# One environment, .venv, for Airflow, the library and the tests; every target makes it first if it is not there.
PYTHON ?= python3.11
UV_VERSION := 0.13.9
TORCH_VERSION := 2.13.0
# A machine that has no CPU wheel of torch at hand takes it from here: make setup TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
TORCH_INDEX_URL ?=
SOURCE ?= auto
# How many processes run the tests.
WORKERS ?= 2
DOCKER ?= docker
# Of an image; empty: the Dockerfile's own base, and crpbot-NAME:VERSION. BUILD_OPTIONS: what else `docker build` is to be told.
BASE_IMAGE ?=
TAG ?=
BUILD_OPTIONS ?=
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export AWS_EC2_METADATA_DISABLED := true
# Some images set it, and then every process of a test or of the demonstration compiles Airflow anew: 6 s each instead of 2.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo up test fault-matrix bench bench-data bench-features bench-training lint format docs lock image-training image-airflow clean

setup: $(STAMP)

$(STAMP): requirements/environment.lock pyproject.toml infra/package-lock.json
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/environment.lock
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch==$(TORCH_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@# the simulator of IAM policies, for tests alone; they say what is missing if this did not work
	npm ci --prefix infra --no-audit --no-fund --loglevel=error || echo "no simulator: the tests of IAM policies will say so"
	touch $(STAMP)

demo: setup
	$(BIN)/crpbot demo --source $(SOURCE)

up: setup
	$(BIN)/crpbot demo --source $(SOURCE) --keep --port 8080

test: setup
	$(BIN)/python -m pytest -n $(WORKERS)

# Every fault at every phase of a run, in a real Airflow: a table of what ended each instance. Goes on where it was interrupted.
# make fault-matrix MATRIX="--short", "--fresh", "--only training"
fault-matrix: setup
	$(BIN)/python -m tests.fault_matrix $(MATRIX)

# What it costs, in figures: tables on the terminal. Minutes; nothing else should be running.
bench: bench-data bench-features bench-training

bench-data: setup
	$(BIN)/python -m benchmarks.limiter
	$(BIN)/python -m benchmarks.load

bench-features: setup
	$(BIN)/python -m benchmarks.features

# On a machine with a GPU also what a model costs there; python -m benchmarks.training --help has the sizes.
bench-training: setup
	$(BIN)/python -m benchmarks.training

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint images/*/Dockerfile

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The generated pages; tests say when they are stale.
docs: setup
	PYTHONPATH=plugins AIRFLOW_HOME=$(CURDIR)/.crpbot/docs $(BIN)/python -m crpbot_airflow.dags_page
	$(BIN)/crpbot features dictionary > docs/features.md

# Versions move only here. --universal: one lock for every platform; torch stays out of it (see pyproject.toml).
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" pyproject.toml
lock: setup
	$(COMPILE) --all-extras -o requirements/environment.lock
	$(COMPILE) --extra torch --extra training -c requirements/environment.lock -o requirements/training.lock
	$(COMPILE) --extra torch --extra training --extra data --extra cli --extra airflow --extra sandbox -c requirements/environment.lock -o requirements/airflow.lock
	$(filter-out pyproject.toml,$(COMPILE)) --group sbom -o requirements/sbom.lock

# The images (docs/containers.md), with any of BASE_IMAGE, TORCH_INDEX_URL, TAG: make image-training TAG=registry/crpbot-training:0.1.0
image-training:
	$(call build,training)

image-airflow:
	$(call build,airflow)

build = $(DOCKER) build --file images/$1/Dockerfile --tag $(or $(TAG),crpbot-$1:$(VERSION)) \
	--build-arg VERSION=$(VERSION) --build-arg REVISION=$(shell git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown) \
	$(foreach name,BASE_IMAGE TORCH_INDEX_URL,$(if $($(name)),--build-arg $(name)=$($(name)))) $(BUILD_OPTIONS) .

clean:
	rm -rf $(VENV) .crpbot build *.egg-info infra/node_modules
