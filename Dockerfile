# One image for JupyterLab, the dashboards, the API and the collector; docker-compose.yml sets the command of each.
FROM python:3.12-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/venv && /opt/venv/bin/pip install uv==0.13.9
ENV VIRTUAL_ENV=/opt/venv UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy
# install the requirements first: this layer is cached while only the code changes
COPY settings.ini setup.py pyproject.toml constraints.txt ./
RUN mkdir -p cryptoresearch nbs/research nbs/dashboards \
    && /opt/venv/bin/uv pip compile -q -c constraints.txt --extra lab --no-annotate --no-header setup.py -o /tmp/requirements.txt \
    && /opt/venv/bin/uv pip install -r /tmp/requirements.txt
COPY README.md LICENSE ./
COPY cryptoresearch cryptoresearch
COPY nbs nbs
RUN /opt/venv/bin/uv pip install --no-deps ".[lab]" && /opt/venv/bin/uv pip uninstall uv

FROM python:3.12-slim-bookworm
# OpenMP, for xgboost
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 research && mkdir -p /work/data /work/runs /work/nbs && chown -R research:research /work
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive CRYPTORESEARCH_HOME=/work
USER research
WORKDIR /work
VOLUME ["/work/data", "/work/runs"]
ENTRYPOINT ["cryptoresearch"]
CMD ["--help"]
