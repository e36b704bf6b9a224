# The service in a container, for a CPU (the default target) or for CUDA: `make image`, `make image TARGET=cuda`.
# docs/self-hosting.md says how to run it. requirements/lock-*.txt pin every package by its hashes: `make lock`.
ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS base
# Debian's security updates may be newer than the base image
RUN apt-get update \
    && apt-get upgrade -y \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt \
    && useradd --uid 1000 --home-dir /cache --create-home vae
# The service reads /repository/endpoint.json, unless MODEL names a model. Inference Endpoints mount a repository there.
RUN mkdir /app /repository && echo '{"model": "tiny"}' > /repository/endpoint.json
WORKDIR /app
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    HF_HOME=/cache/huggingface \
    VAE_REPOSITORY=/repository \
    HOST=0.0.0.0 \
    PORT=8000
USER 1000:1000
EXPOSE 8000
# loading a large model for the first time downloads gigabytes
HEALTHCHECK --interval=10s --timeout=5s --retries=3 --start-period=15m CMD \
    ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://localhost:{os.environ[\"PORT\"]}/health')"]
ENTRYPOINT ["python3", "-m", "scripts.serve"]

FROM base AS build
USER 0:0
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv
RUN python3 -m venv /venv
ENV PIP_NO_CACHE_DIR=1 PIP_REQUIRE_HASHES=1 PIP_ONLY_BINARY=:all:

FROM build AS cpu-packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/lock-cpu.txt ./
RUN pip install --extra-index-url "$TORCH_INDEX" -r lock-cpu.txt && pip check && pip uninstall --yes pip
# torch's own tests and headers
RUN cd /venv/lib/python3*/site-packages/torch && rm -r test include

FROM build AS cuda-packages
COPY requirements/lock-cuda.txt ./
RUN pip install -r lock-cuda.txt && pip check && pip uninstall --yes pip

FROM build AS code
COPY handler.py ./
COPY handlers handlers
COPY models models
COPY scripts/serve.py scripts/connections.py scripts/
RUN python3 -m compileall -q .

FROM base AS cuda
USER 0:0
# Triton compiles the launcher of each kernel of the fast pass (VAE_FAST=1)
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libpython3-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt
USER 1000:1000
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-packages /venv /venv
COPY --from=code /app /app

FROM base AS cpu
COPY --from=cpu-packages /venv /venv
COPY --from=code /app /app
