# syntax=docker/dockerfile:1
# chatflow on an image that model.Dockerfile made. Commands: README.md.
#checkov:skip=CKV_DOCKER_2:workers serve no port; the runner watches them
#checkov:skip=CKV_DOCKER_7:tags are in the ARGs; the launcher has no versions to follow

ARG MODEL_IMAGE
# The same Beam version as in the lock files; a test compares them.
ARG BEAM_IMAGE=docker.io/apache/beam_python3.11_sdk:2.77.0
ARG LAUNCHER_IMAGE=gcr.io/dataflow-templates-base/python311-template-launcher-base:latest

FROM ${BEAM_IMAGE} AS beam
FROM ${LAUNCHER_IMAGE} AS launcher

FROM ${MODEL_IMAGE} AS common
COPY --link --from=beam /opt/apache/beam /opt/apache/beam
# Built by `make wheel`. Its dependencies are installed already, from the lock file.
RUN --mount=type=bind,source=dist,target=/dist \
    pip install --no-cache-dir --no-index --no-deps /dist/chatflow-*.whl

# For Flink's worker pools, Kubernetes, and `docker run`.
FROM common AS runner
# The user `chatflow`, by number for Kubernetes' runAsNonRoot.
USER 1000
WORKDIR /home/chatflow
ENTRYPOINT ["chatflow"]

# For Dataflow: launcher of the Flex Template, and worker. It runs as root, because Google's
# launcher and harness write to root's /var/log/dataflow and /var/opt/google
# (GoogleCloudPlatform/python-docs-samples#13213).
FROM common AS worker
COPY --link --from=launcher /opt/google/dataflow/python_template_launcher \
    /opt/google/dataflow/python_template_launcher
COPY infra/template/main.py /opt/chatflow/template/main.py
ENV FLEX_TEMPLATE_PYTHON_PY_FILE=/opt/chatflow/template/main.py
ENTRYPOINT ["/opt/apache/beam/boot"]
