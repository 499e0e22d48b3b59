# docker build --target server-release --build-arg DEVICE=cpu .     (or: make build)
# docker build --target server-release --build-arg DEVICE=cuda .    (or: make build-cuda)
# --build-arg EXTRAS="ort fms" adds the packages of these extras.

ARG UBI_VERSION=9.6
ARG DEVICE=cpu

## Python, in every stage ##########################################################################
FROM registry.access.redhat.com/ubi9/ubi-minimal:${UBI_VERSION} AS base

ENV LANG=C.UTF-8
# Versions are those of the base image's release.
# hadolint ignore=DL3041
RUN microdnf install -y --nodocs --setopt=install_weak_deps=0 python3.11 \
    && microdnf clean all

## Compiler and pip, which stay behind #############################################################
FROM base AS tools

# The release's own gcc, 11, knows no function variants for x86-64-v4.
# hadolint ignore=DL3041
RUN microdnf install -y --nodocs --setopt=install_weak_deps=0 gcc-toolset-14-gcc \
    && microdnf clean all
ENV PATH=/opt/tgis/bin:/opt/rh/gcc-toolset-14/root/usr/bin:${PATH}
RUN python3.11 -m venv /opt/tgis
WORKDIR /usr/src/tgis
COPY deploy/requirements.txt deploy/requirements.txt

## Packages, by device #############################################################################
FROM tools AS packages-cpu

# Any other index that has PyTorch built for CPUs will do.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" --constraint deploy/requirements.txt torch \
    && python -m pip install --no-cache-dir --requirement deploy/requirements.txt

FROM tools AS packages-cuda

RUN python -m pip install --no-cache-dir --requirement deploy/requirements.txt

## The server ######################################################################################
# hadolint ignore=DL3006,DL3026
FROM packages-${DEVICE} AS server

WORKDIR /usr/src/tgis
# Of ort, fms, bitsandbytes and ray.
ARG EXTRAS=""
COPY deploy/requirements-*.txt deploy/
RUN for extra in ${EXTRAS}; do python -m pip install --no-cache-dir --constraint deploy/requirements.txt --requirement "deploy/requirements-${extra}.txt" || exit 1; done
# All that the machines may have; "generic" alone where they are not x86-64.
ARG KERNEL_TARGETS="amx avx512bf16 avx512 avx2 generic"
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN python -m pip install --no-cache-dir --no-build-isolation --no-deps . \
    && python -m pip check
RUN for target in ${KERNEL_TARGETS}; do python -m tgis.models.kernels.build --target "${target}" || exit 1; done \
    && python -m tgis.sampling.native

FROM server AS server-without-pip

RUN python -m pip uninstall --yes pip

## Integration tests ###############################################################################
FROM server AS cpu-tests

WORKDIR /usr/src/tgis
COPY . .
RUN python -m pip install --no-cache-dir --no-build-isolation --editable ".[dev]" \
    && python -m tgis.models.kernels.build \
    && python -m tgis.sampling.native \
    && install --directory --owner=2000 --group=0 --mode=0770 /home/tgis
ENV HOME=/home/tgis \
    HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
USER 2000:0
CMD ["python", "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", "tests/integration", "tests/contract"]

## What the devices need at run time ###############################################################
FROM base AS runtime-cpu

FROM base AS runtime-cuda

# Libraries come with PyTorch, the driver from the node.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

## The image #######################################################################################
# hadolint ignore=DL3006,DL3026
FROM runtime-${DEVICE} AS server-release

# pip hides in the distribution's Python too; HOME is writable for group 0, whatever the user.
RUN rm -rf /usr/lib64/python3.11/ensurepip /usr/share/python*-wheels \
    && echo 'tgis:x:2000:0::/home/tgis:/sbin/nologin' >> /etc/passwd \
    && install --directory --owner=2000 --group=0 --mode=0770 /home/tgis
COPY --from=server-without-pip --chown=0:0 /opt/tgis /opt/tgis
ENV PATH=/opt/tgis/bin:${PATH} \
    HOME=/home/tgis \
    PYTHONDONTWRITEBYTECODE=1 \
    PORT=3000 \
    GRPC_PORT=8033
RUN for tool in gcc cc c++ clang pip pip3; do if command -v "${tool}"; then exit 1; fi; done \
    && if python -c 'import pip'; then exit 1; fi \
    && text-generation-launcher --version

ARG VERSION=0.1.0
ARG GIT_COMMIT=unknown
LABEL name="text-gen-server" \
      summary="Text generation inference server" \
      description="gRPC service fmaas.GenerationService with continuous batching" \
      version="${VERSION}" \
      org.opencontainers.image.title="tgis" \
      org.opencontainers.image.description="Text generation inference server" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${GIT_COMMIT}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      io.k8s.display-name="Text generation inference server" \
      io.k8s.description="gRPC service fmaas.GenerationService with continuous batching" \
      io.openshift.tags="text-generation,inference,grpc" \
      io.openshift.expose-services="8033:grpc,3000:http"

WORKDIR /home/tgis
USER 2000:0
EXPOSE 3000 8033
# A moment is enough: health never waits for the engine. Kubernetes has probes of its own.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60m --retries=3 \
    CMD ["sh", "-c", "curl --fail --silent --max-time 1 --output /dev/null http://127.0.0.1:${PORT}/health || curl --fail --silent --insecure --max-time 1 --output /dev/null https://127.0.0.1:${PORT}/health"]
ENTRYPOINT ["text-generation-launcher"]
