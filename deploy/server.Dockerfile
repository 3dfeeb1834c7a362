# syntax=docker/dockerfile:1
# The server: a Triton Inference Server with CanvasRT in it, without torch where a GPU runs a bundle. docs/images.md
#
#   docker build -f deploy/server.Dockerfile --build-arg FLAVOR=rtx -t canvasrt/server:0.1.0-rtx .
#
# FLAVOR: rtx (TensorRT-RTX), tensorrt (TensorRT), cpu (torch on the CPU: for trying it out).
# TRITON: pypi (the server that a PyPI package bundles, which our tests run) or nvidia (NVIDIA's own image).

# A release names each of the two with its digest: tag@sha256:...
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:25.10-py3
ARG TRITON=pypi

FROM ${PYTHON_IMAGE} AS wheels
ARG FLAVOR=rtx
ARG TORCH=2.13.0
# Empty: PyTorch's own index of CPU builds.
ARG TORCH_INDEX=
ARG TENSORRT=11.4.0.106
ARG NVIDIA_INDEX=https://pypi.nvidia.com
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY requirements/ requirements/
# Without isolation: what builds a wheel is pinned with hashes too.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --quiet --require-hashes --no-deps -r requirements/wheels.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    case "${FLAVOR}" in \
      rtx) more="rtx" ;; \
      tensorrt) more="tensorrt" ;; \
      cpu) more="torch" ;; \
      *) echo "FLAVOR is rtx, tensorrt or cpu, not '${FLAVOR}'" >&2; exit 1 ;; \
    esac \
    && pip wheel --quiet --require-hashes --no-deps --no-build-isolation --wheel-dir /wheels \
      -r requirements/server.txt -r "requirements/${more}.txt"
# What comes from other indexes is pinned by version only: neither publishes the same file for every machine.
RUN --mount=type=cache,target=/root/.cache/pip \
    case "${FLAVOR}" in \
      tensorrt) pip wheel --quiet --no-deps --wheel-dir /wheels --index-url "${NVIDIA_INDEX}" \
        "tensorrt_cu13_libs==${TENSORRT}" ;; \
      cpu) pip wheel --quiet --no-deps --wheel-dir /wheels \
        --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" "torch==${TORCH}" ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY build/ build/
COPY src/ src/
RUN pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheels .

FROM wheels AS environment
RUN python -m venv --without-pip /opt/canvasrt \
    && pip --python /opt/canvasrt/bin/python install --quiet --no-cache-dir --no-index --no-deps /wheels/*.whl \
    && pip --python /opt/canvasrt/bin/python check
# Beside the environment, as `canvasrt serve` looks for it: the server and the NumPy that its stubs were built for.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --quiet --no-deps --target /opt/canvasrt/triton -r requirements/triton.txt

FROM ${PYTHON_IMAGE} AS base-pypi
# Not pinned: Debian's mirrors keep the newest version only, and a pin would break the build with each fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends curl \
    && rm -rf /var/lib/apt/lists/*
# A server installs nothing; what is not there can't be used against it.
RUN pip uninstall --quiet --yes --root-user-action=ignore pip
RUN groupadd --gid 1000 canvasrt \
    && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin canvasrt
COPY --from=environment /opt/canvasrt/ /opt/canvasrt/

# Never built by us: this image can't be had where our tests run. It brings curl, Python 3.12 and a user 1000.
FROM ${TRITON_IMAGE} AS base-nvidia
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    python3 -m venv --without-pip /opt/canvasrt \
    && python3 -m pip --python /opt/canvasrt/bin/python install --quiet --no-cache-dir --no-index --no-deps \
      /wheels/*.whl

# A stage of this file, not an image that could have a tag.
# hadolint ignore=DL3006
FROM base-${TRITON} AS server
ARG VERSION=0.1.0
ARG FLAVOR=rtx
LABEL org.opencontainers.image.title="canvasrt server (${FLAVOR})" \
    org.opencontainers.image.description="DiffusionGemma through Triton Inference Server" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.licenses="Apache-2.0"
# HOME: libraries look for their caches there, and /tmp is all that a read-only container lets them write. numba would
# first try the folder of our kernels.
ENV PATH=/opt/canvasrt/bin:${PATH} \
    HOME=/tmp \
    NUMBA_CACHE_DIR=/tmp/numba \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# A new volume takes its owner from this folder.
RUN install --directory --owner=1000 --group=1000 /models /etc/canvasrt
USER 1000:1000
WORKDIR /tmp
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
# Triton says that it is healthy when the model is dead; this asks the model itself.
HEALTHCHECK --interval=10s --timeout=25s --start-period=30m --retries=3 \
    CMD ["curl", "-fsS", "-m", "20", "-d", "{\"ping\": true}", \
      "http://127.0.0.1:8000/v2/models/diffusion_gemma/generate"]
ENTRYPOINT ["canvasrt"]
CMD ["serve", "/etc/canvasrt/pipeline.yaml", "--host", "0.0.0.0"]
