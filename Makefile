# Commands for a fresh machine (Linux, Python 3.10 to 3.13 with venv, g++):
#
#   make demo    pre-train a small GreenMIM on real photographs on the CPU
#   make test    run the tests
#   make bench   measure what this machine can; see benchmarks/README.md
#   make lint    style, types and spelling
#   make docs    the API reference, in build/docs
#   make dist    an sdist and a wheel for this kind of processor, checked, in dist/
#   make clean   remove what was compiled
#
# and, on a machine with an NVIDIA GPU,
#
#   make gpu-check         five minutes after set-up: build, are the kernels right, a first table
#   make gpu-check-more    eight more: what failed, tuning, steps, counters, sanitizers
#   make gpu-check-steps   eight more: steps of all encoders, the convolution, other shapes, swap
#
# All set up a virtual environment first. Variables:
#
#   PYTHON=python3.12   interpreter that makes the environment
#   VENV=.venv          where the environment is
#   VENV=               use the interpreter in PYTHON as it is, install nothing
#   TORCH="torch torchvision"   what to install as torch (default: the versions this is tested with)
#   PIP_ARGS=           more arguments for pip when it installs torch, such as an index of CPU builds
#   OUT=runs/demo       where the demo writes
#   DIST=dist           where the sdist and the wheel are written
#   PROCESSES=3         processes that run tests side by side: one more than cores, as many wait
#   ARGS=               more arguments for pytest, the demo, the benchmark or gpu-check (--dry-run)

PYTHON ?= python3
VENV ?= .venv
# The versions this release is tested with.
TORCH ?= torch==2.14.1 torchvision==0.29.1
PIP_ARGS ?=
OUT ?= runs/demo
DIST ?= dist
PROCESSES ?= 3
ARGS ?=

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
READY :=
TOOLS :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools
endif

.PHONY: help demo test bench gpu-check gpu-check-more gpu-check-steps dist dist-files lint docs clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	@echo "installing $(TORCH)"
	$(RUN) -m pip install --quiet $(PIP_ARGS) $(TORCH)
	@touch $@

# An editable install, built against the torch that was just chosen.
$(VENV)/.ready: $(VENV)/.torch $(SOURCES)
	$(RUN) -m pip install --quiet "setuptools>=77" ninja numpy
	@echo "compiling the kernels: a minute; where nvcc is found, CUDA for five GPUs, a quarter of an hour (USE_CUDA=0: not)"
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[test,demo]"
	@touch $@

# What gpu-check needs: it builds the kernels itself, for the GPU that is there alone.
$(VENV)/.tools: $(VENV)/.torch
	$(RUN) -m pip install --quiet "setuptools>=77" ninja numpy "timm>=1.0.22" pytest pytest-xdist pytest-benchmark hypothesis
	@touch $@

demo: $(READY)
	$(RUN) -m examples.demo --out $(OUT) $(ARGS)

# Without groups loadgroup hands out one test after the other, in this order: long ones come first.
test: $(READY)
	$(RUN) -m pytest -n $(PROCESSES) --dist loadgroup --no-loadscope-reorder $(ARGS)

bench: $(READY)
	OMP_WAIT_POLICY=PASSIVE KINETO_LOG_LEVEL=99 $(RUN) -m pytest -q benchmarks --benchmark-disable-gc \
		--benchmark-columns=median,iqr,rounds --benchmark-sort=name $(ARGS)
	$(RUN) -m benchmarks.steps
	$(RUN) -m benchmarks.report

gpu-check: $(TOOLS)
	$(RUN) -m benchmarks.gpu_check first $(ARGS)

gpu-check-more: $(TOOLS)
	$(RUN) -m benchmarks.gpu_check second $(ARGS)

gpu-check-steps: $(TOOLS)
	$(RUN) -m benchmarks.gpu_check third $(ARGS)

# Of the sdist, not of this folder; libraries that come with torch stay there.
dist-files:
	rm -rf $(DIST)/linux $(DIST)/greenmim-*_$$(uname -m).whl $(DIST)/greenmim-*.tar.gz
	mkdir -p $(DIST)/linux
	MANYLINUX=1 $(RUN) -m build --no-isolation --outdir $(DIST)/linux .
	mv $(DIST)/linux/*.tar.gz $(DIST)
	PATH="$$(dirname $$(command -v $(RUN))):$$PATH" $(RUN) -m auditwheel repair --only-plat \
	    --plat manylinux_2_28_$$(uname -m) --exclude 'libtorch*' --exclude 'libc10*' \
	    --exclude 'libcudart*' --wheel-dir $(DIST) $(DIST)/linux/*.whl
	rm -r $(DIST)/linux

dist: $(READY) dist-files
	GREENMIM_DIST=$(DIST) $(RUN) -m pytest -q tests/test_dist.py

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m codespell_lib

# `greenmim` takes its names from these modules.
docs: $(READY)
	$(RUN) -m pdoc --docformat google -o build/docs greenmim_kernels greenmim_kernels.integrations greenmim.mim greenmim.config greenmim.planning greenmim.checkpoint

# An environment without the modules is not ready. What dist/ holds may be there nowhere else.
clean:
	rm -rf build *.egg-info greenmim_kernels/*.so $(READY)
