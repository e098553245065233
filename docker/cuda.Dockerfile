# megakd on plain CUDA: PyTorch's own build, flash-attn; neither Transformer Engine nor Apex, in whose place torch's own run.
#
#   docker build -f docker/cuda.Dockerfile -t megakd-cuda .
#   docker run --gpus all --ipc=host -it megakd-cuda bash scripts/first_hour.sh /results
#
# Built nowhere yet: what each line goes by stands above it.

# devel: flash-attn is compiled with its nvcc ("CUDA toolkit", https://github.com/Dao-AILab/flash-attention, Installation and features);
# 13.0 as PyTorch's own build for Linux, whose major version flash-attn's setup.py compares. Ubuntu 24.04 brings Python 3.12.
# Tags: https://gitlab.com/nvidia/container-images/cuda/-/blob/master/doc/supported-tags.md
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

# python3-dev: Triton compiles a small C module at run time; git: results name the commit.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git python3-dev python3-venv && rm -rf /var/lib/apt/lists/*

# Ubuntu's own Python takes no packages from pip outside an environment (PEP 668).
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# Without an index of its own, pip's torch for Linux is a CUDA build that brings its cuDNN, NCCL and Triton:
# https://pytorch.org/get-started/locally/
RUN pip install --no-cache-dir "torch==2.13.0" "setuptools>=64" wheel

# "Make sure that packaging, psutil and ninja are installed"; "MAX_JOBS" bounds the compilers' memory; --no-build-isolation, for its setup.py
# imports torch: https://github.com/Dao-AILab/flash-attention, Installation and features.
# Cards are those of FLASH_ATTN_CUDA_ARCHS there; Ampere, Hopper and Blackwell by default.
ARG MAX_JOBS=4
RUN pip install --no-cache-dir packaging psutil ninja && pip install --no-cache-dir --no-build-isolation flash-attn

WORKDIR /workspace/megakd
COPY setup.py pyproject.toml Makefile README.md ./
COPY megakd megakd
COPY kernels kernels
COPY benchmarks benchmarks
COPY checkpoint_tools checkpoint_tools
COPY configs configs
COPY scripts scripts
COPY tests tests

RUN pip install --no-cache-dir --no-build-isolation "megatron-core==0.16.1" -e ".[gpu,test]"

# Hopper and Blackwell: kernels compiled when they are first called. https://github.com/Dao-AILab/flash-attention/tree/main/flash_attn/cute
ARG FLASH_4=
RUN if [ -n "$FLASH_4" ]; then pip install --no-cache-dir ".[flash4]"; fi

RUN python -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('torch', 'triton', 'flash_attn', 'megatron.core', 'megakd'))))"
