# Every target sets up .venv by itself.  make demo: the main job.  make test: every test.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test check format bench bench-full docs clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@

demo: .venv/ready
	$(BIN)/delora train recipes/quickstart.toml
	$(BIN)/delora inspect runs/quickstart/adapter

test: .venv/ready
	$(BIN)/pytest

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/ready
	$(BIN)/python -m benchmarks.run

bench-full: .venv/ready
	$(BIN)/python -m benchmarks.run --full

docs: .venv/ready
	$(BIN)/pdoc delora -o site

clean:
	rm -rf .venv runs site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
