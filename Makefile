# make demo   everything, from images to answers, on this machine (about ten minutes after set-up)
# make test   lint, types, import rules and the whole test suite
# make setup  only the virtual environment .venv, with DeepSpeed's CPU communication op compiled
# make soak   the fault tests again with many repetitions, property tests with examples of their own (hours)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo test browser lint soak constraints clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt docker/setup.sh
	@PYTHON="$(PYTHON)" sh docker/setup.sh "$(VENV)"
	@touch $@

demo: setup
	@asvr demo $(DEMO)

lint: setup
	ruff check .
	ruff format --check .
	mypy
	lint-imports

test: lint browser
	pytest -n 2 --dist loadfile $(TESTS)  # two files at a time: much of the suite waits for processes

browser:  # without one the tests of the report fail, and say so; the others run
	@sh docker/browser.sh || true

soak: setup
	ASVR_SOAK_KILLS=50 ASVR_SOAK_TRAIN_KILLS=20 pytest tests/faults --timeout 7200
	pytest --hypothesis-profile random --ignore tests/faults --ignore tests/e2e --ignore tests/benchmarks

constraints: setup
	@(echo "# One tested working set, Python 3.11, CPU build of torch. Regenerate: make constraints"; \
	  pip freeze --exclude asvr | sed 's/+cpu//') > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) demo_run
