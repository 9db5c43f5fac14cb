# Everything runs in .venv, which is set up on first use and again when a pin changes.
PYTHON ?= python3.11
# Extra arguments for torch's own install, such as an index that has only CPU builds.
TORCH_PIP_ARGS ?=
# How many test processes; each computes with one thread.
WORKERS ?= 2
TEST_ARGS ?=
ROUNDS ?= 20
BENCH_ARGS ?=
HIFIGAN_ARGS ?=
CELLS ?=
MATRIX_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DIST_STAMP := $(VENV)/.installed-dist
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help install demo hifigan minilm diffusion sdf test test-long fuzz attack soak matrix flaky coverage lint format docs dist bench gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv

# torch goes first and by itself: the rest then keeps the build that is there (a CPU one, say).
# The build runs with the pinned setuptools, so without isolation.
$(STAMP): pyproject.toml constraints.txt tests/models/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_PIP_ARGS) '$(TORCH)'
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r tests/models/requirements.txt
	@touch $@

demo: $(STAMP) ## train, strip and export a small TCN (under 2 minutes)
	$(BIN)/python examples/digits_tcn.py

minilm: $(STAMP) ## patch, fine-tune, reload, strip and export a pretrained model (2 minutes)
	$(BIN)/python examples/minilm.py

diffusion: $(STAMP) ## a diffusion model of digits, with and without renormalized directions
	$(BIN)/python examples/digits_diffusion.py --picture build/digits_diffusion.png

sdf: $(STAMP) ## a signed distance function with an eikonal loss, with and without weight norm
	$(BIN)/python examples/sdf.py --picture build/sdf.png

hifigan: $(STAMP) ## a small HiFi-GAN: train, resume, strip, export (HIFIGAN_ARGS=--check-resume)
	$(BIN)/python examples/hifigan.py $(HIFIGAN_ARGS)

test: $(STAMP) ## all tests and doctests
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(TEST_ARGS)

test-long: $(STAMP) ## the property tests, with many more cases, a longer soak, and AOTInductor
	$(ONE_THREAD) WN_SURGERY_CASES=20000 $(BIN)/python -m pytest -n $(WORKERS) $(TEST_ARGS) tests/surgery/test_properties.py
	$(ONE_THREAD) WN_SURGERY_SOAK=5000 $(BIN)/python -m pytest $(TEST_ARGS) tests/attack/test_soak.py
	$(ONE_THREAD) WN_SURGERY_LONG=1 $(BIN)/python -m pytest $(TEST_ARGS) tests/export/test_verify.py tests/checkpoints/test_files.py

fuzz: $(STAMP) ## hostile checkpoint files, many more of them
	$(ONE_THREAD) WN_SURGERY_FUZZ=20000 $(BIN)/python -m pytest -n $(WORKERS) $(TEST_ARGS) tests/checkpoints/test_hostile.py

attack: $(STAMP) ## random sequences of operations against a twin in float64, 100,000 of them
	$(ONE_THREAD) WN_SURGERY_ATTACK=100000 $(BIN)/python -m pytest -n $(WORKERS) $(TEST_ARGS) tests/attack

soak: $(STAMP) ## a training with operations at random moments, 300,000 steps of it (about an hour)
	$(ONE_THREAD) WN_SURGERY_SOAK=300000 $(BIN)/python -m pytest $(TEST_ARGS) tests/attack/test_soak.py

matrix: ## the tests on the oldest and newest versions, in .matrix (CELLS=oldest for one)
	$(PYTHON) tests/project/matrix.py $(CELLS) --torch-arguments='$(TORCH_PIP_ARGS)' $(MATRIX_ARGS)

flaky: $(STAMP) ## the tests with processes, threads and kills, ROUNDS times beside two busy processes
	$(ONE_THREAD) $(BIN)/python tests/project/flaky.py $(ROUNDS) -n $(WORKERS) --dist loadgroup $(TEST_ARGS)

coverage: $(STAMP) ## the tests again, then every line that none of them runs
	$(BIN)/coverage erase
	$(ONE_THREAD) $(BIN)/coverage run -m pytest $(TEST_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --show-missing --skip-covered

lint: $(STAMP) ## ruff, mypy --strict, pyright: every hook of .pre-commit-config.yaml
	$(BIN)/pre-commit run --all-files --hook-stage pre-push

format: $(STAMP) ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## the site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo 'To read it with its search: $(BIN)/python -m http.server --directory build/site'

dist: $(DIST_STAMP) ## wheel and sdist, in dist/: built, checked, installed without network
	$(BIN)/python tests/project/dist.py

$(DIST_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dist]'
	@touch $@

bench: $(STAMP) ## every benchmark, alternated in one process (BENCH_ARGS=--quick for minutes)
	$(ONE_THREAD) $(BIN)/python -m benchmarks $(BENCH_ARGS)

gpu: $(STAMP) ## on a CUDA device: its tests, then the benchmark; commit what it writes
	$(BIN)/python -m pytest tests/gpu $(TEST_ARGS)
	$(BIN)/python -m benchmarks --gpu --resume $(BENCH_ARGS)

clean: ## remove .venv and whatever was built
	rm -rf $(VENV) .matrix build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
