# docker build --target pipeline -t tlpipe .        docker run --gpus all -v "$PWD":/workspace tlpipe
# docker build --target serve -t tlpipe-serve .     docker run -p 8000:8000 -v "$PWD"/artifacts/export/bundle:/bundle:ro tlpipe-serve

FROM python:3.12-slim AS base
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1
RUN python -m venv /opt/venv && pip install --no-cache-dir uv==0.13.8
WORKDIR /app
COPY pyproject.toml constraints.txt prefect.yaml README.md LICENSE ./
COPY data data
COPY flows flows
COPY tlpipe tlpipe

# Answers over HTTP from a bundle: no torch, no MLflow, no root.
FROM base AS serve
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --compile-bytecode -c constraints.txt '.[serve,cpu]'
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["tlpipe", "serve", "--host", "0.0.0.0"]
CMD ["--model", "/bundle"]

# The tracking server of compose.yaml.
FROM base AS tracking
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --compile-bytecode -c constraints.txt '.[tracking]'
ENV MLFLOW_DISABLE_TELEMETRY=true
USER 10001
WORKDIR /tmp

# Reproduces the workspace that is mounted, or waits for Prefect's runs:
# docker run ... tlpipe prefect worker start --pool tlpipe
FROM base AS pipeline
# gcc and libc6-dev: torch.compile builds its kernels' launchers with a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory '*'
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --compile-bytecode -c constraints.txt '.[pipeline,gpu]'
ENV MLFLOW_DISABLE_TELEMETRY=true \
    DVC_NO_ANALYTICS=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false
WORKDIR /workspace
CMD ["dvc", "repro"]
