# Everything is done in .venv, which is made when it is needed; `make` alone lists the targets.

# The first of these that is Python 3.11 or later and can make a virtual environment.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
    $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
    done)
VENV ?= .venv
# Further options of pip install, e.g. --extra-index-url of the CPU builds of torch.
PIP_FLAGS ?=
# Two processes; one that is done takes over half of what the other still has.
PYTEST_FLAGS ?= -n 2 --dist worksteal

BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
# What .venv holds is told by two stamps: the package with what it imports, then everything else.
BASE := $(VENV)/base
INSTALLED := $(VENV)/installed
# Top-level folders that install as packages of keysync_jax (package_dir in setup.cfg).
MAPPED := convert configs launch

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test parity-gpu lint style types layers format layout clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: $(INSTALLED)  ## Set up .venv with the package (editable), its tests' and its tools' requirements

$(BASE): setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 with venv is needed (make PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e .
	@touch $@

# mediapipe brings a cv2 that needs libGL; the headless one, put over it, does not.
$(INSTALLED): $(BASE)
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps --force-reinstall opencv-python-headless
	@touch $@

demo: $(BASE)  ## Dub a synthetic clip with the embedded model and measure the result, in ./demo
	JAX_PLATFORMS=cpu $(BIN)/keysync demo -o demo

test: $(INSTALLED)  ## Run the tests (PYTEST_FLAGS: which, how)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest $(PYTEST_FLAGS)

# Beside the golden numbers the release itself, at full size, where KEYSYNC_REFERENCE and
# KEYSYNC_REFERENCE_PYTHON name its checkout and its environment's interpreter.
PARITY := build/parity
LIVE = $(BIN)/keysync parity --reference "$(KEYSYNC_REFERENCE)" --python "$(KEYSYNC_REFERENCE_PYTHON)" --size full
parity-gpu: $(INSTALLED)  ## Compare with the reference on a GPU; build/parity/table.md, pictures
	@rm -rf $(PARITY)
	@failed=0; set -x; \
	XLA_PYTHON_CLIENT_PREALLOCATE=false \
	    $(BIN)/python -m pytest tests/parity -m 'gpu or reference' || failed=1; \
	for dtype in fp32 tf32 bf16 fp16; do \
	    $(BIN)/keysync parity --golden tests/golden/tiny --dtype $$dtype -o $(PARITY)/golden-$$dtype || failed=1; \
	done; \
	if test -n "$(KEYSYNC_REFERENCE)"; then \
	    $(LIVE) --training -o $(PARITY)/full-fp32 || failed=1; \
	    for script in infer_raw inference; do \
	        $(LIVE) --as-released $$script -o $(PARITY)/full-$$script || failed=1; \
	    done; \
	fi; \
	cat $(PARITY)/*/report.md > $(PARITY)/table.md; \
	exit $$failed

lint: style types layers  ## Check format, style, types and import layers

style: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED) layout
	cd .lint && $(abspath $(BIN))/mypy --config-file ../setup.cfg --cache-dir ../.mypy_cache -p keysync_jax

layers: $(INSTALLED) layout
	cd .lint && $(abspath $(BIN))/lint-imports --config ../setup.cfg --no-cache

format: $(INSTALLED)  ## Format the code and repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The package as it installs, in links: mypy and import-linter do not see through the editable install.
layout:
	@rm -rf .lint && mkdir -p .lint/keysync_jax
	@cd .lint/keysync_jax && ln -s ../../keysync_jax/* $(addprefix ../../,$(MAPPED)) .

clean:  ## Remove .venv and everything that was built
	rm -rf $(VENV) .lint .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
