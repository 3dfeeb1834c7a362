# syntax=docker/dockerfile:1
# The builder: downloads a checkpoint, quantizes it and compiles a bundle, on a volume that the server reads.
# docs/images.md
#
#   docker build -f deploy/builder.Dockerfile --build-arg FLAVOR=rtx -t canvasrt/builder:0.1.0-rtx .
#
# FLAVOR: rtx (TensorRT-RTX, torch with CUDA), tensorrt (TensorRT, torch with CUDA), cpu (torch for the CPU).

# A release names it with its digest: tag@sha256:...
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS wheels
ARG FLAVOR=rtx
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
      rtx|tensorrt) set -- -r "requirements/${FLAVOR}.txt" ;; \
      cpu) set -- ;; \
      *) echo "FLAVOR is rtx, tensorrt or cpu, not '${FLAVOR}'" >&2; exit 1 ;; \
    esac \
    && pip wheel --quiet --require-hashes --no-deps --no-build-isolation --wheel-dir /wheels \
      -r requirements/server.txt -r requirements/torch.txt -r requirements/builder.txt "$@"
# NVIDIA's index publishes no hashes that we could hold it to from here: pinned by version.
RUN --mount=type=cache,target=/root/.cache/pip \
    case "${FLAVOR}" in \
      tensorrt) pip wheel --quiet --no-deps --wheel-dir /wheels --index-url "${NVIDIA_INDEX}" \
        "tensorrt_cu13_libs==${TENSORRT}" ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY build/ build/
COPY src/ src/
RUN pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheels .

FROM wheels AS environment
ARG FLAVOR=rtx
ARG TORCH=2.13.0
# Empty: PyPI, whose torch is for CUDA 13, or PyTorch's own index of CPU builds where the flavor is cpu.
ARG TORCH_INDEX=
RUN python -m venv --without-pip /opt/canvasrt \
    && pip --python /opt/canvasrt/bin/python install --quiet --no-cache-dir --no-index --no-deps /wheels/*.whl
# With what it depends on: a CUDA build names CUDA's libraries in exact versions, and all else is there already.
RUN --mount=type=cache,target=/root/.cache/pip \
    case "${FLAVOR}" in \
      cpu) index="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" ;; \
      *) index="${TORCH_INDEX:-https://pypi.org/simple}" ;; \
    esac \
    && pip --python /opt/canvasrt/bin/python install --quiet --index-url "${index}" "torch==${TORCH}" \
    && pip --python /opt/canvasrt/bin/python check

FROM ${PYTHON_IMAGE} AS builder
ARG VERSION=0.1.0
ARG FLAVOR=rtx
LABEL org.opencontainers.image.title="canvasrt builder (${FLAVOR})" \
    org.opencontainers.image.description="Downloads, quantizes and compiles DiffusionGemma" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.licenses="Apache-2.0"
RUN pip uninstall --quiet --yes --root-user-action=ignore pip
RUN groupadd --gid 1000 canvasrt \
    && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin canvasrt
COPY --from=environment /opt/canvasrt/ /opt/canvasrt/
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
STOPSIGNAL SIGTERM
ENTRYPOINT ["canvasrt"]
CMD ["prepare", "/etc/canvasrt/pipeline.yaml"]
