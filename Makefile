# Thin names over the commands that CI runs too. `make help` lists them.
VENV ?= .venv
PY = $(VENV)/bin/python
PYTHON ?= python3
STAMP = $(VENV)/.antiphon-setup

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test fuzz faults check bench fidelity eval eval-full plan-eval drift wheel

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP) ## make .venv with everything that a machine without a GPU needs

$(STAMP): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q -e '.[sglang-cpu,langchain,eval,dev]'
	$(PY) -m pip install -q --no-deps sglang==0.5.23 nixl-cu12==1.5.1 nixl==1.5.1
	touch $@

check: $(STAMP) ## ruff, mypy --strict, layering, wheel
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	rm -rf build/types && mkdir -p build/types/antiphon
	ln -s $(addprefix ../../../,scheduler engines policies traces eval scheduler/client scheduler/langchain) build/types/antiphon/
	$(PY) -m mypy
	$(VENV)/bin/pytest -q tests/test_layering.py tests/test_packaging.py

test: $(STAMP) ## the whole test suite, with real engines, real NIXL and a real Valkey
	$(VENV)/bin/pytest -q

fuzz: $(STAMP) ## 1,000,000 random events through the core, closed-form engines, parsers, the API; SEED=n, EXAMPLES=n
	$(PY) -m antiphon.eval.fuzz --events $(or $(EVENTS),1000000) --seed $(or $(SEED),1)
	$(PY) -m tests.closed_form_pair --scenarios $(or $(SCENARIOS),4000) --seed $(or $(SEED),1)
	$(PY) -m tests.fuzz_parsers --examples $(or $(EXAMPLES),20000) --seed $(or $(SEED),1)
	ANTIPHON_OPENAPI_ALL=1 $(VENV)/bin/pytest -q --hypothesis-seed=$(or $(SEED),1) tests/test_openapi.py

demo: $(STAMP) ## real engines serve a small agent trace; checked token by token
	$(PY) -m antiphon.eval.demo

serve: $(STAMP) ## the demo's stack, left up, with a curl line that works
	$(PY) -m antiphon.eval.demo --serve

bench: $(STAMP) ## ratios measured in one run; TRACE=file, DYNAMO=python with ai-dynamo
	$(PY) -m antiphon.eval.bench $(if $(TRACE),--trace $(TRACE)) $(if $(DYNAMO),--dynamo $(DYNAMO))

fidelity: $(STAMP) ## live engines against the simulator: how far off it is
	$(PY) -m antiphon.eval.fidelity

eval: $(STAMP) ## every policy on every trace: docs/results.md; TRACES=folder, else they are generated
	$(PY) -m antiphon.eval.standard $(if $(TRACES),--traces $(TRACES)) $(if $(RESUME),--resume)

eval-full: $(STAMP) ## the same with three seeds, a third cluster, more sessions; goes on where it stopped
	$(PY) -m antiphon.eval.standard --full --resume --out build/eval-full $(if $(TRACES),--traces $(TRACES))

drift: $(STAMP) ## a day with a shifting mix: static splits against pools that follow the load (20 min on one core): JOBS=n
	$(PY) -m antiphon.eval.drift $(if $(JOBS),--jobs $(JOBS))

plan-eval: $(STAMP) ## the planner's plans against brute force and others: docs/planner_results.md; TRACES=folder
	$(PY) -m antiphon.eval.planner.standard --large $(if $(TRACES),--traces $(TRACES))

faults: $(STAMP) ## faults on the live stack, real engines included (30 min): SEED=n, CELLS='redis.*', ENGINES=simulated
	$(PY) -m tests.faults --seed $(or $(SEED),1) $(if $(CELLS),--cells '$(CELLS)') $(if $(ENGINES),--engines $(ENGINES))
