# The image that launch.render's jobs run: this package, and the locked versions of all that it needs.
#
#     docker build --build-arg ACCELERATOR=tpu --tag REPOSITORY/sleep_jax .
#     docker push REPOSITORY/sleep_jax       # prints the digest that --image asks for
#
# ACCELERATOR: tpu, or cuda13 for GPUs. Its plugin is the release that the locked jax names.
FROM python:3.12-slim-bookworm

ARG ACCELERATOR=tpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /opt/sleep_jax

COPY requirements/lock.txt requirements/lock.txt
RUN pip install --require-hashes -r requirements/lock.txt \
 && pip install "jax[${ACCELERATOR}]==$(python -c 'import importlib.metadata as m; print(m.version("jax"))')"

COPY . .
RUN pip install --no-deps --no-build-isolation . && pip check
WORKDIR /runs
