# The image of jobs on TPUs, GPUs or CPUs: docs/pods.md.
#   docker build --build-arg EXTRA=tpu -t qwen-jax .
# EXTRA: tpu, cuda12, cuda13 or triton of pyproject.toml, several with commas, or nothing for CPUs.
# RUN_AS: user of the image; xpk needs 0 for TPUs, whose devices are root's.

FROM python:3.11.14-slim-bookworm

ARG EXTRA=tpu
ARG RUN_AS=1000

RUN useradd --uid 1000 --create-home qwen
WORKDIR /opt/qwen-jax

COPY constraints/py311.txt constraints/py311.txt
COPY pyproject.toml README.md LICENSE ./
COPY pallas_kernels pallas_kernels
COPY qwen_jax qwen_jax
COPY convert convert
RUN pip install --no-cache-dir --constraint constraints/py311.txt ".${EXTRA:+[$EXTRA]}" \
    && qwen-jax --version

USER ${RUN_AS}
WORKDIR /home/qwen
CMD ["qwen-jax", "--help"]
