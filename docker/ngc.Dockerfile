# megakd on NVIDIA's PyTorch image, which brings CUDA, PyTorch, Triton, Transformer Engine, Apex and flash-attn built for each other.
#
#   docker build -f docker/ngc.Dockerfile -t megakd .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -it megakd bash scripts/first_hour.sh /results
#
# Built nowhere yet: what each line goes by stands above it.

# 26.03: PyTorch 2.11.0a0, Python 3.12, CUDA 13.2. setup.py asks for torch >= 2.10, of which 2.11.0a0 is one and 2.10.0a0 (until 26.01) is none.
# Contents by release: https://docs.nvidia.com/deeplearning/frameworks/pytorch-release-notes/index.html
FROM nvcr.io/nvidia/pytorch:26.03-py3

WORKDIR /workspace/megakd
COPY setup.py pyproject.toml Makefile README.md ./
COPY megakd megakd
COPY kernels kernels
COPY benchmarks benchmarks
COPY checkpoint_tools checkpoint_tools
COPY configs configs
COPY scripts scripts
COPY tests tests

# "Transformer Engine library is preinstalled in the PyTorch container in versions 22.09 and later":
# https://docs.nvidia.com/deeplearning/transformer-engine-releases/release-2.11/user-guide/installation.html
# Since 25.03 the image constrains pip to its own versions (PIP_CONSTRAINT=/etc/pip/constraint.txt): nothing below can take its torch's place.
# megatron-core 0.16.1 has wheels for Python 3.12 and knows that Transformer Engine; the extra `gpu` finds Triton and flash-attn there.
# --no-build-isolation: a build is to see the image's torch, https://pip.pypa.io/en/stable/cli/pip_install/#cmdoption-no-build-isolation
RUN pip install --no-cache-dir --no-build-isolation "megatron-core==0.16.1" -e ".[gpu,test]"

# By the modules that are there alone: no GPU, and so no driver, is at hand while an image is built.
RUN python -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('transformer_engine', 'megatron.core', 'megakd'))))"
