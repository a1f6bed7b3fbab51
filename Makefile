.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint docs bench

bin := .venv/bin
ready := .venv/.ready

help:
	@echo "make demo       prune the small model that comes along and show what it costs"
	@echo "make test       linters, types, documentation and the tests of a few minutes"
	@echo "make test-slow  the longer tests"
	@echo "make lint       linters and types alone"
	@echo "make docs       the documentation, in docs/_build"
	@echo "make bench      the benchmark sweep"

$(ready): setup.cfg pyproject.toml constraints.txt
	test -x $(bin)/python || python3 -m venv .venv
	$(bin)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(ready)
	$(bin)/moonshot demo

lint: $(ready)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

docs: $(ready)
	$(bin)/sphinx-build -W -q -b html docs docs/_build

test: lint docs
	$(bin)/python -m pytest -n 2 -m "not slow"

test-slow: $(ready)
	$(bin)/python -m pytest -n 2 -m slow

bench: $(ready)
	$(bin)/python benchmarks/sweep.py
