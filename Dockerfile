# Images of the platform, built at the root of the source tree:
#   docker build --target cpu  --tag timeviper:0.2.0-cpu  .     the head and decoding
#   docker build --target cuda --tag timeviper:0.2.0-cuda .     encoding, training, serving
# The CUDA image compiles kernels: about half an hour, and no GPU.

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /build
COPY . .
RUN python -m pip install --no-cache-dir --constraint constraints.txt hatchling \
    && python -m hatchling build -t wheel -d dist

FROM python:3.11-slim-bookworm AS base
RUN useradd --create-home --uid 1000 ray
ENV PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /build
COPY constraints.txt constraints-cuda.txt ./
COPY --from=wheel /build/dist dist

FROM base AS cpu
# torch without CUDA's libraries, which are gigabytes
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN python -m pip install --no-cache-dir --constraint constraints.txt dist/*.whl
USER 1000
WORKDIR /home/ray
CMD ["timeviper", "--help"]

FROM base AS kernels
# nvcc of the CUDA version that this torch is built for
COPY --from=nvidia/cuda:13.0.1-devel-ubuntu22.04 /usr/local/cuda-13.0 /usr/local/cuda
ENV CUDA_HOME=/usr/local/cuda \
    MAMBA_FORCE_BUILD=TRUE \
    CAUSAL_CONV1D_FORCE_BUILD=TRUE \
    TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0" \
    MAX_JOBS=4
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m pip install --no-cache-dir --constraint constraints-cuda.txt torch setuptools wheel packaging ninja \
    && python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir kernels --constraint constraints-cuda.txt \
       mamba-ssm causal-conv1d

FROM base AS cuda
# Triton compiles its launchers with a C compiler when a kernel first runs
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=kernels /build/kernels kernels
RUN python -m pip install --no-cache-dir --constraint constraints-cuda.txt dist/*.whl kernels/*.whl
USER 1000
WORKDIR /home/ray
CMD ["timeviper", "--help"]
