# Everything is run from here. Needs Python 3.11 or later, pip, git and make; the rest goes into $(VENV).
#
#   make run     build the environment, then generate from the model in examples/
#   make serve   build the environment, then serve the model in examples/ at http://127.0.0.1:$(PORT)
#   make test    all tests
#   make check   format, lint, types, import contracts, house rules and fast tests: about a minute
#   make simulate  two million steps of the control plane under random traffic and faults: some minutes
#   make overload, hang, kills, slow-reader, fuzz, schemathesis, lm-eval  proofs of the server: docs/operations.md says what each one shows
#   make prove-serving  all of these, one after another in short form
#   make bench   throughput and latency on the model in examples/
#   make test-intel, make test-tpu  the tests and the conformance suite of these plugins, in environments of their own
#   make conform  prove the CPU platform and the reference platform; bundles go to build/conformance
#   make conform-gpus  the suite on the platforms of GPUs; where there is none, in Triton's interpreter
#   make static-code  compile the kernels for every architecture, without a GPU, and judge their code
#   make sanitize  the native kernels of zif-cpu under the address and undefined-behaviour sanitizers
#   make self-test  try the suite on its bank of mutants: each must be killed by the test that is known to do so
#   make matrix  write README's support matrix from the bundles of make conform
#   make freeze  regenerate the must-pass lists of the conformance profiles, and the list of clauses and tests
#   make lock    regenerate the lock file of the contract's public surface
#   make clean   remove the environment and what tools left behind

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/cpu.txt
MODEL ?= examples/embedded_model/checkpoint
PROMPT ?= Return a list of
PORT ?= 8000
WORKERS ?= 2
SEED ?= 1
BUNDLES ?= build/conformance

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_SERVE := $(VENV)/.installed-serve
PROJECTS := core plugins/cpu conformance
SOURCES := core plugins conformance examples
VENDORS := intel tpu
# Their kernels run in Triton's interpreter and are compiled without a GPU in the environment of developers.
GPUS := nvidia amd
PROVEN_GPUS ?= $(GPUS)
PLUGINS := cpu $(GPUS) $(VENDORS)
NATIVE := plugins/cpu/CMakeLists.txt $(wildcard plugins/cpu/native/*/*)
TYPED := core/src $(PLUGINS:%=plugins/%/src) conformance/src
TESTS := core/tests $(PLUGINS:%=plugins/%/tests) conformance/tests
FAST := $(addprefix core/tests/,contract host house settings scheduling kv null parsing simulation text cli) conformance/tests

.PHONY: run serve test test-intel test-tpu check simulate bench conform conform-gpus static-code sanitize self-test matrix freeze lock clean environment
.PHONY: overload hang kills slow-reader fuzz schemathesis lm-eval prove-serving

run: $(INSTALLED)
	$(BIN)/zif generate $(MODEL) --prompt "$(PROMPT)" --max-tokens 128 --temperature 0.6 --top-p 0.9 --request-seed 1

serve: $(INSTALLED_SERVE)
	$(BIN)/zif serve $(MODEL) --port $(PORT)

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

test-intel:
	PYTHON=$(PYTHON) constraints/prove intel $(BUNDLES) $(WORKERS)

test-tpu:
	PJRT_DEVICE=CPU PYTHON=$(PYTHON) constraints/prove tpu $(BUNDLES) $(WORKERS)

check: $(INSTALLED_DEV)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy $(TYPED)
	PYTHONPATH=plugins/intel/src:plugins/tpu/src $(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" $(wildcard $(FAST))

conform-gpus: $(INSTALLED_DEV)
	for gpu in $(PROVEN_GPUS); do \
	    $(BIN)/zif conform --platform $$gpu --profile core --bundle $(BUNDLES)/$$gpu --workers $(WORKERS) && \
	    $(BIN)/zif conform verify $(BUNDLES)/$$gpu || exit 1; \
	done

static-code: $(INSTALLED_DEV)
	for gpu in $(PROVEN_GPUS); do $(BIN)/zif conform --platform $$gpu --level L8 || exit 1; done

sanitize: $(INSTALLED_DEV)
	cmake -S plugins/cpu -B build/sanitize -DZIF_CPU_SANITIZE=ON
	cmake --build build/sanitize --parallel $(WORKERS)
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 ZIF_CPU_LIBRARY=build/sanitize/libzif_cpu.so OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest -q -n $(WORKERS) -k "not compile and not memory_of_a_step" plugins/cpu/tests/native

simulate: $(INSTALLED)
	$(BIN)/zif simulate --seed $(SEED) --steps 2000000 --workers $(WORKERS)

overload: $(INSTALLED_DEV)
	$(BIN)/python benchmarks/overload.py $(OVERLOAD)

hang: $(INSTALLED_DEV)
	$(BIN)/python core/tests/serving/engine/hang.py $(HANG)

kills: $(INSTALLED_DEV)
	$(BIN)/python core/tests/serving/engine/kills.py --seed $(SEED) $(KILLS)

slow-reader: $(INSTALLED_DEV)
	$(BIN)/python core/tests/serving/http/slow_reader.py $(SLOW_READER)

fuzz: $(INSTALLED_DEV)
	$(BIN)/python core/tests/serving/http/fuzz.py --seed $(SEED) $(FUZZ)

schemathesis: $(INSTALLED_DEV)
	$(BIN)/python core/tests/serving/http/schemathesis_run.py $(SCHEMATHESIS)

lm-eval: $(INSTALLED_DEV)
	$(BIN)/python core/tests/serving/lm_eval_run.py

# Options of the proofs in short form; a variable that is given on the command line stands.
prove-serving: OVERLOAD ?= --seconds 30 --peak-seconds 6
prove-serving: HANG ?= --kill-after 5
prove-serving: KILLS ?= --kills 20
prove-serving: SLOW_READER ?= --readers 8 --rounds 2 --leavers 50
prove-serving: FUZZ ?= --requests 5000
prove-serving: SCHEMATHESIS ?= --max-examples 20
prove-serving: kills hang slow-reader fuzz schemathesis lm-eval overload

bench: $(INSTALLED)
	$(BIN)/zif bench throughput $(MODEL) --num-prompts 64 --input-len 128 --output-len 128
	$(BIN)/zif bench latency $(MODEL) --batch-size 1 --input-len 128 --output-len 128 --repeats 5

conform: $(INSTALLED_DEV)
	$(BIN)/zif conform --platform cpu --profile distributed --bundle $(BUNDLES)/cpu --workers $(WORKERS)
	$(BIN)/zif conform verify $(BUNDLES)/cpu
	$(BIN)/zif conform --platform reference --profile distributed --bundle $(BUNDLES)/reference --workers $(WORKERS)
	$(BIN)/zif conform verify $(BUNDLES)/reference

self-test: $(INSTALLED_DEV)
	$(BIN)/zif conform self-test --quick --workers $(WORKERS)

matrix: $(INSTALLED)
	$(BIN)/zif conform matrix $(wildcard $(addprefix $(BUNDLES)/,$(PLUGINS) reference)) --readme README.md --keep docs/bundles

freeze: $(INSTALLED)
	$(BIN)/python -m zif_conformance.freeze
	$(BIN)/python -m zif_conformance.clauses docs/contract.md docs/contract-tests.md

lock: $(INSTALLED)
	$(BIN)/python -m zif.contract.surface

environment: $(INSTALLED_DEV)

$(INSTALLED): pyproject.toml $(CONSTRAINTS) $(PROJECTS:%=%/pyproject.toml) $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "zif needs Python 3.11 or later: set PYTHON")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PROJECTS:%=--editable ./%)
	touch $@

$(INSTALLED_SERVE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable './core[serve]'
	touch $@

$(INSTALLED_DEV): $(INSTALLED) $(GPUS:%=plugins/%/pyproject.toml)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable './core[dev]' $(GPUS:%=--editable ./plugins/%)
	touch $@

clean:
	rm -rf $(VENV) $(VENDORS:%=.venv-%) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find core plugins conformance -name __pycache__ -prune -exec rm -rf {} +
	find core plugins conformance -name '*.egg-info' -prune -exec rm -rf {} +
