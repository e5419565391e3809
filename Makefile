# Each target works as the first command on a fresh clone: it makes .venv if that is missing
PYTHON  ?= python3
WORKERS ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
OLDEST  := .oldest

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm docs clean $(VENV)

help:
	@echo 'make demo    quantize the embedded model, check it and say what it cost'
	@echo 'make test    notebooks in step with the package, site, notebook tests, pytest'
	@echo 'make test-vllm  serve small models with vLLM on the CPU, in .vllm (3.5 GB); not part of make test'
	@echo 'make docs    README.md from the index notebook, and the site in _docs'
	@echo 'make clean   remove what the other targets made, .venv apart'
	@echo 'make .venv   the environment alone; PYTHON=python3.12 chooses another Python (3.10 or newer)'

$(VENV): $(READY)

# `venv --clear` also mends an environment that was interrupted half way
$(READY): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3,10) and "python: $(PYTHON) is %d.%d, need 3.10 or newer; try make PYTHON=python3.12" % v or 0)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo '== .venv: installing what constraints.txt pins, 1.3 GB with a CPU build of torch; this takes some minutes once'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The oldest transformers that is supported, on top of everything else from the environment
$(OLDEST)/.ready: tests/oldest.txt $(READY)
	@echo '== .oldest: the oldest transformers that is supported, beside the environment'
	@rm -rf $(OLDEST)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(OLDEST) -r tests/oldest.txt
	@touch $@

demo: $(READY)
	@$(BIN)/hlwq demo

# Notebooks run side by side, with one thread each, and so do files of tests; pytest comes last, so that its count is the last line
test: export TRITON_INTERPRET = 1
test: $(READY) $(OLDEST)/.ready
	@echo '== notebooks: exported and clean'
	@$(BIN)/python tools/check.py
	@echo '== site'
	@$(BIN)/python tools/docs.py check site
	@echo '== notebooks: every cell'
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(WORKERS)
	@echo '== tests of packed models, with the oldest transformers'
	@PYTHONPATH=$(CURDIR)/$(OLDEST) $(BIN)/python -m pytest tests/test_transformers.py tests/test_load_model.py tests/test_kv_cache.py -q
	@echo '== tests'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n $(WORKERS) --dist loadfile

# vLLM wants an environment of its own: it pins torch and transformers. About fifteen minutes, of which eight install it
test-vllm: $(READY)
	@$(BIN)/python tests/vllm/run.py --venv .vllm --write

docs: $(READY)
	@$(BIN)/python tools/docs.py readme site

clean:
	rm -rf _docs _proc _site_src build dist hlwq-demo .pytest_cache .hypothesis
	find hlwq nbs tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
