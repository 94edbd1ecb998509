# Instance and KV daemon, for CPUs and for NVIDIA GPUs.
#   docker build -f deploy/docker/engine.Dockerfile --target cpu -t infinite-llm/engine:0.1.0-cpu .
#   docker build -f deploy/docker/engine.Dockerfile --target cuda -t infinite-llm/engine:0.1.0-cuda .
ARG PYTHON=docker.io/library/python:3.11.13-slim-bookworm

FROM ${PYTHON} AS build
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# An index that has torch without CUDA makes the CPU image much smaller; by default torch comes from pip's own index.
ARG TORCH_INDEX_URL=
COPY constraints.txt ./
RUN python -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check \
      -c constraints.txt ${TORCH_INDEX_URL:+--index-url} ${TORCH_INDEX_URL} torch \
 && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt dumb-init
COPY pyproject.toml setup.py LICENSE ./
COPY sdk/ sdk/
COPY services/ services/
COPY kernels/ kernels/
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ./sdk '.[rdma]' \
 && test -n "$(find /opt/venv -path '*kernels/cpu/_native*.so')" \
 && python -m compileall -q /opt/venv/lib

FROM ${PYTHON} AS cpu
COPY --from=build /opt/venv /opt/venv
WORKDIR /
# The root file system is read-only; what libraries want to cache goes to /tmp. Nothing is ever loaded from a hub.
ENV PATH=/opt/venv/bin:$PATH PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOME=/tmp HF_HOME=/tmp/huggingface HF_HUB_OFFLINE=1 TRITON_CACHE_DIR=/tmp/triton
USER 10001:10001
STOPSIGNAL SIGTERM
# As process 1 a program that has not installed a handler yet ignores SIGTERM; dumb-init is process 1 instead.
ENTRYPOINT ["dumb-init", "--", "python", "-m"]

FROM cpu AS cuda
USER root
# Triton compiles a stub for each kernel with the system's C compiler when it is first used. CUDA's own libraries came
# with torch; the driver is the node's.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# MPS is used where a control daemon listens in this directory, and else not.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CUDA_MPS_PIPE_DIRECTORY=/run/nvidia-mps CUDA_MPS_LOG_DIRECTORY=/run/nvidia-mps
USER 10001:10001
