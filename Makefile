# One environment, pinned, and the commands people run. `make demo` and `make test` work on a fresh machine with
# Python 3.11 and a C++ compiler.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# What pip is asked for, so that a machine without a GPU may name a CPU build: make demo TORCH="torch==2.13.0 --index-url ..."
TORCH  ?= torch==2.13.0

.PHONY: help install demo test test-slow test-slurm prove lint format clean
help:
	@echo "make demo                        the whole pipeline on two CPU cores, in minutes; ends with a report"
	@echo "make demo VIDEOS=/some/folder    the same on your own videos (class = sub-folder), into runs/demo_FOLDER"
	@echo "make demo ARGS=...               more for stpredict launch: ARGS=\"--rerun prior\", ARGS=run=runs/other"
	@echo "make test                        the test suite   (make test-slow: the long proofs)"
	@echo "make test-slurm                  the tests on a real SLURM of two nodes, started here (needs slurm-wlm, munge)"
	@echo "make prove                       kills a training run 25 times; writes benchmarks/results/kills.md"
	@echo "make install                     .venv with pinned dependencies and DeepSpeed's CPU op built"
	@echo "make lint, make format           ruff"
	@echo "on a cluster (docs/cluster.md):  stpredict doctor --cluster a100_80g --nodes 2"
	@echo "                                 stpredict launch configs/pipelines/nbp.yaml --cluster a100_80g"

install: $(READY)

# torch first and by itself: whatever asks for plain `torch` brings gigabytes of CUDA. Then everything else, pinned.
# doctor builds DeepSpeed's CPU op once, so that no job compiles (a kill then would leave a lock behind).
$(READY): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/stpredict doctor
	touch $@

demo: $(READY)
ifdef VIDEOS
	$(BIN)/stpredict launch configs/pipelines/demo_videos.yaml --cluster local vars.videos="$(abspath $(VIDEOS))" \
		run="runs/demo_$(notdir $(abspath $(VIDEOS)))" $(ARGS)
else
	$(BIN)/stpredict launch configs/pipelines/demo.yaml --cluster local $(ARGS)
endif

# A worker that dies, as one whose test hangs does after a while, ends the run: xdist would run that test again and again.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not slow and not slurm"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-slurm: $(READY)
	$(BIN)/python -m pytest -m slurm tests/slurm

prove: $(READY)
	$(BIN)/python -m tests.distributed.kills --kills 25 --log benchmarks/results/kills.md

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
