# The image of every service: dependencies and the wheel are built in stages of their own, so that the runtime holds no
# compiler, no pip and no source tree. Builds with and without BuildKit.
#
# For production pin the base by digest: --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:<digest>
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# ---- What pyproject.toml asks for: a layer that the source does not touch.
FROM ${PYTHON_IMAGE} AS dependencies
# The CPU build of torch has an index of its own; the one on PyPI brings gigabytes of CUDA libraries. Empty: not asked.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
      >requirements.txt \
    && python -m venv /opt/elasticmoe \
    && /opt/elasticmoe/bin/pip install --no-cache-dir --disable-pip-version-check \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --requirement requirements.txt \
    && /opt/elasticmoe/bin/pip uninstall --yes --quiet pip \
    # torch's tests, headers and tools, a fifth of its size; `import torch` asks for the one tool that stays.
    && cd /opt/elasticmoe/lib/python3.11/site-packages/torch \
    && rm -rf include share test \
    && find bin -type f ! -name torch_shm_manager -delete

# ---- The project's wheel.
FROM ${PYTHON_IMAGE} AS wheel
RUN command -v g++ >/dev/null \
    || { apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*; }
WORKDIR /src
COPY pyproject.toml ./
# The second environment only says for which interpreter the wheel's commands are installed.
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
      >requirements.txt \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --disable-pip-version-check cmake ninja --requirement requirements.txt \
    && python -m venv --without-pip /opt/elasticmoe
ENV PATH=/opt/build/bin:$PATH
COPY CMakeLists.txt LICENSE ./
COPY native native
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
# The run directory's ownership is what a new volume mounted there inherits.
RUN groupadd --gid 10001 elasticmoe \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin elasticmoe \
    && install -d -m 0700 -o 10001 -g 10001 /run/elasticmoe
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
