# One command each; none needs preparation: .venv is made on the first use.
.DEFAULT_GOAL := help
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
# tests run in as many processes as there are cores; JOBS=0: in one, e.g. for a debugger
JOBS ?= logical
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8

# bytecode is worth its disk space: without it each start of the command line compiles a few thousand files again
unexport PYTHONDONTWRITEBYTECODE
# waiting threads sleep instead of spinning: several times faster where others use the cores too
export OMP_WAIT_POLICY ?= passive
# an activated environment elsewhere must not be taken for this one
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH

S3_SERVERS ?= build versitygw seaweedfs

.PHONY: help venv demo test test-all quick lab dashboards api bench lint docs docs-site minio s3-matrix hooks clean distclean

help:  ## show this text
	@echo "cryptoresearch: from raw trades to a prediction one can believe"
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "More arguments go behind ARGS, e.g. make test ARGS='-k bars', make api ARGS='--port 9001'."

venv: $(READY)  ## create or update .venv (the other targets do this when needed)

$(READY): settings.ini setup.py pyproject.toml constraints.txt scripts/make_venv.py
	@python=$$(sh scripts/find_python) && "$$python" scripts/make_venv.py $(VENV)
	@touch $@

demo: $(READY)  ## run everything: trades, bars, features, model, report, live predictions
	@$(BIN)/cryptoresearch demo $(ARGS)

test: $(READY)  ## run all notebooks and all tests except the heavy ones
	@$(BIN)/python scripts/s3_server.py --prepare
	@$(PYTEST) $(ARGS)

test-all: $(READY)  ## run all tests, with long kills, complete audits and the wheel in an empty environment
	@$(BIN)/python scripts/s3_server.py --prepare
	@$(PYTEST) --heavy $(ARGS)
	@$(MAKE) s3-matrix

s3-matrix: $(READY)  ## run the tests that need an S3 server on MinIO, versitygw and SeaweedFS, one after the other
	@for server in $(S3_SERVERS); do \
	    echo "--- $$server"; \
	    CRYPTORESEARCH_S3=$$server $(BIN)/python scripts/s3_server.py --prepare || exit 1; \
	    CRYPTORESEARCH_S3=$$server $(BIN)/python -m pytest -q -p no:xdist -m s3 $(ARGS) || exit 1; \
	done

quick: $(READY)  ## run the tests except the slow ones
	@$(PYTEST) --quick $(ARGS)

lab: $(READY)  ## start JupyterLab
	@$(BIN)/jupyter lab $(ARGS)

dashboards: $(READY)  ## serve the Voila pages
	@$(BIN)/cryptoresearch dashboards $(ARGS)

api: $(READY)  ## serve the REST API
	@$(BIN)/cryptoresearch api $(ARGS)

bench: $(READY)  ## run the benchmark notebooks again, in place
	@found=$$(find nbs/benchmarks -maxdepth 1 -name '*.ipynb' | sort); \
	if [ -z "$$found" ]; then echo "no notebooks in nbs/benchmarks"; exit 1; fi; \
	for nb in $$found; do \
	    $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=3600 "$$nb" || exit 1; \
	    $(BIN)/nbdev_clean --fname "$$nb" || exit 1; \
	done

lint: $(READY)  ## run ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

docs: $(READY)  ## write README.md from nbs/index.ipynb
	@$(BIN)/python scripts/readme.py

docs-site: $(READY)  ## build the documentation site into _docs/html
	@$(BIN)/python scripts/docs_site.py $(ARGS)

minio: $(READY)  ## find an S3 server for the tests
	@$(BIN)/python scripts/s3_server.py --prepare

hooks: $(READY)  ## install git hooks in this clone: clean, export and lint before a commit; merge notebooks cell by cell
	@git config core.hooksPath .githooks
	@git config merge.nbdev-merge.name "merge notebooks cell by cell"
	@git config merge.nbdev-merge.driver "$(BIN)/nbdev_merge %O %A %B %P"
	@echo "hooks are on; to switch them off: git config --unset core.hooksPath"

clean:  ## remove caches and build leftovers; keep .venv, data and runs
	@rm -rf build dist _docs _proc .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	@find . -path ./$(VENV) -prune -o -path ./data -prune -o -path ./runs -prune -o \
	    \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	@rm -rf $(VENV) *.egg-info
