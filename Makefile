# Two commands: `make demo` shows the main job on real input, `make test` passes the tests. Both set up .venv as far as they need it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MM_READY := $(VENV)/.ready-mm
WORKERS ?= $(shell nproc)

.PHONY: demo mm test timm-tests lint models measure exports gpu clean

demo: $(READY)
	$(BIN)/python tools/demo.py

# mmdetection and mmsegmentation, for detection and segmentation.
mm: $(MM_READY)

test: $(MM_READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# timm's own tests of models on every classification network here, but for TorchScript: half an hour with two cores.
# TIMM_OPTIONS="-k nano" takes half a minute.
timm-tests: $(READY)
	$(BIN)/python tests/timm_contract.py $(TIMM_OPTIONS)

lint: $(READY)
	$(BIN)/ruff check .
	PYTHONPATH=. $(BIN)/lint-imports --config setup.cfg --no-cache

# The tables of models, from the registry and from what the next two have measured.
models: $(READY)
	$(BIN)/python tools/model_table.py README.md
	$(BIN)/python tools/model_table.py docs/models.md --whole

# The time of the tables' models beside ResNet-50's. On a quiet machine with two cores: five minutes.
measure: $(READY)
	$(BIN)/python tools/benchmark.py $$($(BIN)/python -c "from zoo.measuring.model_table import listed; print(*listed())") \
		--against benchmarks.resnet50:build --batch 1 --rounds 9 --forward-only --json benchmarks/models.json

# Every model as ONNX, compared and timed: less than two hours with two cores. Goes on where it was stopped.
exports: $(READY)
	$(BIN)/python tools/export_onnx.py --all --jobs 2 -o build/onnx
	cp build/onnx/exports.json build/onnx/exports.md benchmarks/

# Everything that needs a GPU, in under 9 minutes, with the python3 of a machine that has torch, triton, timm and pytest and from
# which nothing can be downloaded.
gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) tools/gpu.py $(GPU_OPTIONS)

$(READY): setup.cfg pyproject.toml constraints.txt
	@echo "Setting up $(VENV): about 2 minutes and 6 GB, once."
	@$(BIN)/python -c "" 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	@touch $(READY)

$(MM_READY): $(READY) tools/install_mm.sh
	@tools/install_mm.sh $(BIN)/python
	@touch $(MM_READY)

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache
