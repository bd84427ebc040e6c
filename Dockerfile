# The image of every service: dependencies and the wheel are built in stages of their own, so that the runtime holds no
# compiler, no pip and no source tree. Builds with and without BuildKit.
#
# For production pin the base by digest: --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:<digest>
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# ---- The lists of what pyproject.toml asks for: later layers are redone when these change, not with every other line.
FROM ${PYTHON_IMAGE} AS requirements
WORKDIR /requirements
COPY pyproject.toml ./
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
    print(*p["project"]["dependencies"], *p["project"]["optional-dependencies"]["otel"], sep="\n", \
          file=open("runtime.txt", "w")); \
    print(*p["build-system"]["requires"], sep="\n", file=open("build.txt", "w"))'

# ---- The runtime's environment but for the project itself.
FROM ${PYTHON_IMAGE} AS dependencies
# The CPU build of torch has an index of its own; the one on PyPI brings gigabytes of CUDA libraries. Empty: not asked.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=requirements /requirements/runtime.txt /requirements/
RUN python -m venv /opt/elasticmoe \
    && /opt/elasticmoe/bin/pip install --no-cache-dir --disable-pip-version-check \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --requirement /requirements/runtime.txt \
    && /opt/elasticmoe/bin/pip uninstall --yes --quiet pip \
    # torch's tests, headers and tools, a fifth of its size; `import torch` asks for the one tool that stays.
    && cd /opt/elasticmoe/lib/python3.*/site-packages/torch \
    && rm -rf include share test \
    && find bin -type f ! -name torch_shm_manager -delete

# ---- The project's wheel, installed into a folder of its own.
FROM ${PYTHON_IMAGE} AS wheel
RUN command -v g++ >/dev/null \
    || { apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*; }
COPY --from=requirements /requirements/build.txt /requirements/
# The second environment only says for which interpreter the wheel's commands are installed.
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --disable-pip-version-check \
      --requirement /requirements/build.txt 'cmake>=3.25' ninja \
    && python -m venv --without-pip /opt/elasticmoe
ENV PATH=/opt/build/bin:$PATH
WORKDIR /src
COPY pyproject.toml CMakeLists.txt LICENSE ./
COPY native native
COPY elasticmoe elasticmoe
# A wheel without the Python packages leaves the compiled objects behind: a change of Python code compiles nothing.
RUN mkdir cli common services \
    && pip wheel --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir /tmp/native-only . \
    && rm -rf /tmp/native-only
COPY common common
COPY services services
COPY cli cli
RUN pip wheel --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir /tmp/wheels . \
    && pip --python /opt/elasticmoe/bin/python install --disable-pip-version-check --no-deps --no-cache-dir \
      --prefix /install /tmp/wheels/*.whl

# ---- The runtime.
FROM ${PYTHON_IMAGE}
# The folders' ownership is what new volumes mounted there inherit; those without a volume stay empty and read-only.
RUN groupadd --gid 10001 elasticmoe \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin elasticmoe \
    && install -d -m 0700 -o 10001 -g 10001 /run/elasticmoe \
      /run/elasticmoe/sockets /run/elasticmoe/state /run/elasticmoe/secrets /run/elasticmoe/logs /run/elasticmoe/store \
    && install -d -m 0755 /secrets \
    && install -d -m 0700 -o 10001 -g 10001 /secrets/init /secrets/store /secrets/scaler /secrets/router
COPY --from=dependencies /opt/elasticmoe /opt/elasticmoe
COPY --from=wheel /install /opt/elasticmoe
# PYTHONSAFEPATH: the working directory is not searched for modules. One OpenMP thread: ranks share the cores.
ENV PATH=/opt/elasticmoe/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_NUM_THREADS=1 \
    ELASTICMOE_RUN_DIR=/run/elasticmoe
USER 10001:10001
WORKDIR /
CMD ["elasticmoe", "--help"]
