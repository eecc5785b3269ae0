# make demo, make test and make bench each set up what they need, in .venv.
PYTHON ?= python3
VENV ?= .venv
# on Linux PyPI's build of it brings CUDA along, PyTorch's CPU index (PIP_EXTRA_INDEX_URL) has one without; README says more
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
OUT ?= runs/demo
# a folder of its own per checkout, so that the demo's data never mixes with anybody's
PHANTOMS ?= phantoms

.PHONY: demo test bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: the build of the extension needs it, and no other requirement may pick another build
$(VENV)/torch: $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check setuptools wheel ninja "$(TORCH)"
	touch $@

# pip compiles the extension anew whenever it installs the package, so each of the three begins where torch is there
SOURCES := pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)

$(VENV)/package: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable .
	touch $@

$(VENV)/package-test: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test,export]"
	touch $(VENV)/package $@

$(VENV)/package-bench: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test,bench]"
	touch $(VENV)/package $@

demo: $(VENV)/package
	rm -rf $(OUT)
	$(BIN)/python -m spss_fast.train --dataset phantom --data-dir $(PHANTOMS) --out $(OUT)
	$(BIN)/python -m spss_fast.evaluate --run $(OUT)

test: $(VENV)/package-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest

bench: $(VENV)/package-bench
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

clean:
	rm -rf $(VENV) build spss_fast/_C*.so
