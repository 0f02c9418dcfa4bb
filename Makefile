# make run    set up, reproduce the pipeline, say what came out
# make test   set up, check, and run the tests that take seconds
# make test-slow   the other tests: whole runs, real servers, kills
# make coverage   the share of the code that the tests of 'make test' run; fails below a floor
# make flow   the pipeline as a Prefect flow
# make ui     MLflow's pages over this workspace's registry
# make docs   the documentation, into site/
# make pictures   the pictures and transcripts in docs/, from real runs
# make constraints   pin the dependencies anew

PYTHON ?= python3
# onnxruntime-gpu where an NVIDIA driver is found; ask for it with RUNTIME=gpu.
RUNTIME ?= $(shell if [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; then echo gpu; else echo cpu; fi)
PORT ?= 5000
# Tests often wait for what they start: four processes fill two cores, and none spins.
IN_PARALLEL = -n 4 --dist worksteal $(PYTEST_OPTIONS)
PYTEST = OMP_WAIT_POLICY=passive pytest $(IN_PARALLEL)
READY = .venv/ready-$(RUNTIME)
PACKAGES = -c constraints.txt -e '.[pipeline,serve,dev,$(RUNTIME)]'

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DO_NOT_TRACK = 1
export DVC_NO_ANALYTICS = 1
export MLFLOW_DISABLE_TELEMETRY = true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION = false
export PREFECT_SERVER_ANALYTICS_ENABLED = false

.PHONY: run setup test lint quick test-slow coverage flow ui docs pictures constraints

run: setup
	@tlpipe run

# Where Python may not write byte-code, each process would compile tlpipe anew.
setup: $(READY)
	@.venv/bin/python -m compileall -qq -j 0 tlpipe tests

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"tlpipe needs Python 3.11 to 3.13; {sys.executable} is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12 run")'
	rm -f .venv/ready-*
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@# The two runtimes hold the same files: only one may ever be installed.
	.venv/bin/python -m pip uninstall -q -y onnxruntime onnxruntime-gpu
	if command -v uv >/dev/null; then \
	  uv pip install -q --python .venv/bin/python $(PACKAGES); \
	else \
	  .venv/bin/python -m pip install -q --disable-pip-version-check --no-compile $(PACKAGES); \
	fi
	@# On all cores, where pip would take one. Some packages hold files that this Python cannot read.
	.venv/bin/python -m compileall -qq -j 0 .venv/lib || true
	touch $@

test: setup
	@$(MAKE) --no-print-directory -j 2 lint quick

lint:
	ruff check
	ruff format --check
	mypy
	@# Its cache goes by the times of files, and several processes write it.
	lint-imports --no-cache
	hadolint Dockerfile

quick:
	$(PYTEST) -m 'not slow'

test-slow: setup
	$(PYTEST) -m slow

coverage: setup
	coverage erase
	OMP_WAIT_POLICY=passive coverage run -m pytest $(IN_PARALLEL) -m 'not slow'
	coverage combine -q
	coverage report

flow: setup
	@tlpipe flow

ui: setup
	tlpipe ui --port $(PORT)

docs: setup
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

pictures: run
	python docs/pictures.py

# Names and versions only, for Python 3.11 to 3.13 and both runtimes.
constraints:
	uv pip compile -q pyproject.toml --all-extras --universal --python-version 3.11 --upgrade \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links --output-file constraints.txt
