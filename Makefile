# Each target does all of its own set-up: make, git, Python >= 3.10 with pip are enough.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
# Two workers fit the two cores CI has; each keeps to one thread.
WORKERS ?= 2

.PHONY: test test-gpu test-configurations test-device-ir test-hub test-deepspeed test-oldest-peft demo demo-lm qlora trl-sft trl-dpo mislabelled study bench lint test-newest docs clean

test: $(VENV)/.ready lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal --durations=20

# What needs a GPU, on one. Stopped, it goes on where it was: what has passed is in GPU_PASSED.
GPU_PASSED ?= runs/gpu-tests-passed.txt
test-gpu: $(VENV)/.ready
	mkdir -p $(dir $(GPU_PASSED)) && touch $(GPU_PASSED)
	$(RUN) -m pytest -q -m gpu -n $(WORKERS) --dist worksteal --unless-in $(GPU_PASSED) --passed-to $(GPU_PASSED) $(ARGS) tests

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

demo: $(VENV)/.ready-demo
	$(RUN) examples/demo.py --output runs/demo $(ARGS)

demo-lm: $(VENV)/.ready-demo-lm
	$(RUN) examples/demo_lm.py --output runs/demo-lm $(ARGS)

qlora: $(VENV)/.ready-demo-lm
	$(RUN) examples/qlora.py --output runs/qlora $(ARGS)

trl-sft trl-dpo: $(VENV)/.ready-demo-lm
	$(RUN) examples/$(subst -,_,$@).py --output runs/$@ $(ARGS)

mislabelled: $(VENV)/.ready-demo
	$(RUN) examples/mislabelled.py --output runs/mislabelled $(ARGS)

# Results are kept a cell at a time: Ctrl-C stops, the same command goes on. ARGS=--quick is a small part of it.
study: $(VENV)/.ready-study
	OMP_NUM_THREADS=1 $(RUN) -m bench.study $(ARGS)

bench: $(VENV)/.ready
	$(RUN) -m bench $(ARGS)

# The kernel tests by the interpreter, with what a GPU of this architecture would be given: as they will run there.
ARCH ?= sm_90
test-configurations: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal --configurations-of $(ARCH) tests/kernels

# The newest Triton, which the pins do not name: all kernels by its interpreter, what it compiles, what it launches.
test-newest: .venv-newest/.ready
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -q -n $(WORKERS) --dist worksteal tests/kernels tests/test_offline_compile.py \
	    tests/test_compile_report.py tests/test_launching.py tests/test_plans.py tests/test_configs.py tests/test_sweep_plan.py

# The oldest PEFT that pyproject.toml allows, beside the pinned rest; CI runs the newest. That PEFT imports names which torchao has no more.
test-oldest-peft: .venv-oldest-peft/.ready
	PYTHONPATH=. OMP_NUM_THREADS=1 .venv-oldest-peft/bin/python -m pytest -q -n $(WORKERS) tests/test_peft.py tests/test_peft_parity.py tests/test_peft_sequences.py \
	    tests/test_peft_quantized.py tests/test_peft_qlora.py tests/kernels/test_peft_layers.py tests/test_checkpoint.py

# The package for the kernels hub by the hub's own loader, which stands apart: transformers changes its ways where it finds it.
test-hub: $(VENV)/hub/.ready
	PYTHONPATH=$(abspath $(VENV)/hub) OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/test_hub.py

$(VENV)/hub/.ready: $(VENV)/.ready requirements-hub.txt
	$(PIP) install -q --no-deps --upgrade --target $(VENV)/hub -r requirements-hub.txt
	touch $@

# DeepSpeed's ZeRO, which stands apart for the same reason.
test-deepspeed: $(VENV)/deepspeed/.ready
	PYTHONPATH=$(abspath $(VENV)/deepspeed) OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/test_deepspeed.py

$(VENV)/deepspeed/.ready: $(VENV)/.ready requirements-deepspeed.txt
	$(PIP) install -q --no-deps --upgrade --target $(VENV)/deepspeed -r requirements-deepspeed.txt
	touch $@

# The kernels as compiled for a GPU, executed on the CPU. FULL=1: every combination, where CI takes every pair.
test-device-ir: .venv-device-ir/.ready
	PYTHONPATH=. OMP_NUM_THREADS=1 .venv-device-ir/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -o addopts= \
	    -p no:cacheprovider --confcutdir=tests/device_ir tests/device_ir

# torch first and pinned, so that no other package's wish for it brings another build.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[train,dev]'
	touch $@

$(VENV)/.ready-demo: $(VENV)/.ready requirements-demo.txt
	$(PIP) install -q --no-deps -r requirements-demo.txt
	touch $@

$(VENV)/.ready-demo-lm: $(VENV)/.ready requirements-demo-lm.txt
	$(PIP) install -q --no-deps -r requirements-demo-lm.txt
	touch $@

$(VENV)/.ready-study: $(VENV)/.ready requirements-study.txt
	$(PIP) install -q --no-deps -r requirements-study.txt
	touch $@

.venv-newest/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q -c constraints.txt torch
	.venv-newest/bin/python -m pip install -q -e '.[dev]'
	.venv-newest/bin/python -m pip install -q --upgrade triton
	touch $@

.venv-oldest-peft/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest-peft
	.venv-oldest-peft/bin/python -m pip install -q -c constraints.txt torch
	.venv-oldest-peft/bin/python -m pip install -q -c constraints.txt -e '.[train,dev]'
	.venv-oldest-peft/bin/python -m pip install -q --no-deps peft==0.18.0
	.venv-oldest-peft/bin/python -m pip uninstall -q -y torchao
	touch $@

# The site, into site/; a warning is an error.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

.venv-docs/.ready: requirements-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q -r requirements-docs.txt
	touch $@

# No dependencies are looked for: ttsem declares a newer Python than it needs, and torch asks for a Triton of its own.
.venv-device-ir/.ready: requirements-device-ir.txt
	$(PYTHON) -m venv .venv-device-ir
	.venv-device-ir/bin/python -m pip install -q --no-deps --ignore-requires-python -r requirements-device-ir.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest-peft .venv-device-ir .venv-docs site build dist *.egg-info runs
