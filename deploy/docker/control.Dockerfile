# Gateway and gManager: no torch, no compiler, no shell needed at run time.
#   docker build -f deploy/docker/control.Dockerfile -t infinite-llm/control:0.1.0 .
ARG PYTHON=docker.io/library/python:3.11.13-slim-bookworm

FROM ${PYTHON} AS build
WORKDIR /src
COPY constraints.txt deploy/docker/control-requirements.txt ./
COPY sdk/ sdk/
RUN python -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check \
      -c constraints.txt -r control-requirements.txt ./sdk
COPY services/__init__.py /app/services/__init__.py
COPY services/core/ /app/services/core/
COPY services/runtime/ /app/services/runtime/
COPY services/rmanager/ /app/services/rmanager/
COPY services/gateway/ /app/services/gateway/
COPY services/gmanager/ /app/services/gmanager/
RUN python -m compileall -q /app /opt/venv/lib

FROM ${PYTHON}
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
WORKDIR /
# The root file system is read-only: nothing is written beside the code.
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
STOPSIGNAL SIGTERM
# As process 1 a program that has not installed a handler yet ignores SIGTERM; dumb-init is process 1 instead.
ENTRYPOINT ["dumb-init", "--", "python", "-m"]
