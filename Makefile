# Every target installs its requirements in the virtual environment VENV.
#   make test PYTHON=python3.12      choose the interpreter of a new environment
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
MINUTES ?= 60
FAULTS_ARGS ?=

BIN := $(VENV)/bin
BASE := $(VENV)/.base
READY := $(VENV)/.ready
LEAVES := outputs/demo_leaves/test/*/00000.png
TORCHAO := $(VENV)/torchao
OPENVINO := $(VENV)/openvino
ROWS ?=
CLIENTS ?=
EXAMPLES ?=
UV := .compat/uv/bin/uv

.DEFAULT_GOAL := help
.PHONY: help browser demo demo-web test openvino faults hf-tests compat clients style quality docs notebooks clean

help:  ## print this list
	@echo "make TARGET [PYTHON=python3.11] [PYTEST_ARGS=...]"
	@sed -n 's/^\([a-z-]*\):.*##\(.*\)/  \1	\2/p' $(MAKEFILE_LIST)

demo: $(BASE)  ## train a small CLCA ViT on drawn leaves, on a CPU, without a download: outputs/demo
	HF_HUB_OFFLINE=1 $(BIN)/python run_ufgir.py recipes/demo.yaml
	@ls $(LEAVES) >/dev/null 2>&1 || $(BIN)/python -m dataset_scripts.synthetic_leaves --output outputs/demo_leaves --images_per_class 1 1 1 --image_size 109
	HF_HUB_OFFLINE=1 $(BIN)/ufgir visualize outputs/demo $(LEAVES) --what rollout --output outputs/demo/rollout.png

demo-web: $(READY)  ## build the web page of the demo model, which runs in a browser without a server: outputs/demo/web
	@[ -f outputs/demo/model.safetensors ] || $(MAKE) --no-print-directory demo
	HF_HUB_OFFLINE=1 $(BIN)/ufgir export outputs/demo --web outputs/demo/web --title "Cultivars of drawn leaves"
	@echo "Look at it: $(BIN)/ufgir export outputs/demo --web outputs/demo/web --serve"

test: quality $(TORCHAO) browser  ## check style and types, then run the tests: PYTEST_ARGS="-k evit" for some of them, "-m slow" for the slow ones
	PYTHONPATH=$(TORCHAO) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/test_quantization.py
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --durations=15 $(PYTEST_ARGS)

openvino: $(OPENVINO)  ## install OpenVINO (190 MB) in a separate folder, and run its tests, which are skipped otherwise
	PYTHONPATH=$(OPENVINO) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -k "openvino or deployments" tests/export tests/profiling

hf-tests: $(READY)  ## run transformers' own common tests on the models; downloads them with pip once
	@$(INSTALL) parameterized
	HF_HUB_OFFLINE=1 $(BIN)/python -m hf_tests $(PYTEST_ARGS)

faults: $(READY)  ## kill trainings and corrupt data at random for MINUTES=60, and print a table: FAULTS_ARGS="--seed 1 --record faults.jsonl"
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --minutes $(MINUTES) $(FAULTS_ARGS)

compat: $(UV)  ## test with old and new versions of the requirements, one environment after another: ROWS="python3.12-newest gpu-image"
	$(PYTHON) -m tests.compat $(UV) $(ROWS)

clients: $(UV)  ## run programs of others on our models, each in a separate environment: CLIENTS="captum onnx_runtime", EXAMPLES=folder of transformers' example scripts
	EXAMPLES="$(EXAMPLES)" $(PYTHON) -m tests.clients $(UV) $(CLIENTS)

docs: $(READY)  ## build the documentation site: docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html

notebooks: $(READY)  ## run the notebooks of docs/ and save their outputs
	HF_HUB_OFFLINE=1 $(BIN)/python docs/run_notebooks.py

quality: $(READY)  ## check style and types without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(VENV) --error-on-warning

style: $(READY)  ## fix the style where possible, and update the tables of methods
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	HF_HUB_OFFLINE=1 $(BIN)/python docs/_extensions/method_table.py

clean:  ## delete caches and builds, but not the environment and outputs
	rm -rf build dist docs/_build *.egg-info .pytest_cache .ruff_cache .hf_tests .compat
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The tests of the web pages need Chromium and ONNX Runtime Web. They are installed from Debian and npm if possible; otherwise the tests
# are skipped with a message.
browser: $(READY)
	@$(BIN)/python -m ufgir.web.runtime || echo "ONNX Runtime Web is not available: the tests of the page without a server are skipped"
	@which chromium chromium-browser google-chrome 2>/dev/null | grep -q . || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	    && echo "Installing Debian's Chromium (once)" && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
	    || echo "Chromium is not available: the tests of the web page are skipped"

# In a separate folder, because with torchao installed every import of transformers' Trainer warns about its GPU kernels.
$(TORCHAO): $(READY)
	@rm -rf $@
	$(INSTALL) --no-deps --target $@ torchao

# In a separate folder, and without its package for usage statistics.
$(OPENVINO): $(READY)
	@rm -rf $@
	$(INSTALL) --no-deps --target $@ openvino nncf pydot

# uv creates environments in seconds, with hard links to its cache: .compat/cache, or UV_CACHE_DIR on the same disk.
$(UV):
	@$(PYTHON) -m venv .compat/uv
	@.compat/uv/bin/python -m pip install --quiet --disable-pip-version-check uv

# An environment is up to date if its file is newer than the requirements: $(BASE) has the package alone, which is sufficient for the
# demo, $(READY) also the development tools.
REQUIREMENTS := setup.cfg pyproject.toml constraints.txt
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(BASE): $(REQUIREMENTS)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is required, but $(PYTHON) is %d.%d. Choose another one: make PYTHON=python3.11 ..." % sys.version_info[:2])' \
	    && echo "Creating the virtual environment $(VENV) (once, takes minutes)" && $(PYTHON) -m venv $(VENV); }
	$(INSTALL) --editable .
	@touch $@

$(READY): $(BASE)
	@echo "Installing the development tools (once, takes minutes)"
	$(INSTALL) --editable '.[dev]'
	@touch $@
