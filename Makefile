.DEFAULT_GOAL := help
.PHONY: help demo test test-faults test-slow lint docs bench bench-large bench-growth bench-gpu bench-solvers comparison

bin := .venv/bin
ready := .venv/.ready
bench := .venv-bench/bin
bench_ready := .venv-bench/.ready
results := benchmarks/solvers/outputs/results.csv

help:
	@echo "make demo       prune the small model that comes along and show what it costs"
	@echo "make test       linters, types, documentation and the tests of a few minutes"
	@echo "make test-faults  runs that are killed, full disks, damaged folders, at random: ten minutes"
	@echo "make test-slow  the longer tests, and random ones on new examples"
	@echo "make lint       linters and types alone"
	@echo "make docs       the documentation, in docs/_build"
	@echo "make bench      every solver's speed beside its peers', and what changed since the last run: ten minutes"
	@echo "make bench-large   the same on a Llama's layers too: hours"
	@echo "make bench-growth  how times grow with rows, columns, factors and tokens"
	@echo "make bench-gpu      the GPU tests, every solver and prune on one CUDA device: eight minutes"
	@echo "make bench-solvers  every solver and its peers on all data sets, by benchopt: five minutes"
	@echo "make comparison     docs/comparison.md and its figure from what that measured"

$(ready): setup.cfg pyproject.toml constraints.txt
	test -x $(bin)/python || python3 -m venv .venv
	$(bin)/python -m pip install --quiet -c constraints.txt -e ".[all]"
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

test-faults: $(ready)
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(bin)/python -m pytest -s tests/faults

test-slow: $(ready)
	$(bin)/python -m pytest -n 2 -m "slow or fresh" --hypothesis-profile fresh

bench: $(ready)
	$(bin)/python -m benchmarks.speed

bench-large: $(ready)
	$(bin)/python -m benchmarks.speed --large --output benchmarks/outputs/speed-large.json

bench-growth: $(ready)
	$(bin)/python -m benchmarks.speed.growth

bench-gpu: $(ready)
	$(bin)/python -m benchmarks.gpu

$(bench_ready): benchmarks/requirements.txt setup.cfg pyproject.toml
	test -x $(bench)/python || python3 -m venv .venv-bench
	$(bench)/python -m pip install --quiet -r benchmarks/requirements.txt -e .
	@touch $@

bench-solvers: $(bench_ready)
	rm -f $(results)
	NUMBA_NUM_THREADS=2 OMP_NUM_THREADS=2 $(bench)/benchopt run benchmarks/solvers --no-cache --no-plot --output $(results)

comparison: $(bench_ready)
	$(bench)/python benchmarks/solvers/plot.py $(results) docs/comparison.png
	$(bench)/python benchmarks/solvers/report.py $(results) docs/comparison.md
