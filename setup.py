"""Packaging of megakd and of megakd_kernels, which lives in kernels/ and needs torch (and, on a GPU, Triton) only."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "megakd" / "__init__.py").read_text()).group(1)

setup(
    name="megakd",
    version=VERSION,
    description="Exact, on-policy knowledge distillation of Hugging Face language models on megatron-core",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",  # megatron-core 0.16.1 comes as wheels for these
    packages=[*find_packages(include=["megakd", "megakd.*"]), *find_packages("kernels")],
    package_dir={"megakd_kernels": "kernels/megakd_kernels"},
    package_data={"megakd.simulation": ["shim.cpp"]},
    install_requires=[
        "torch>=2.10",  # addmm adds bfloat16 products to a float32 sum, which the fused heads do on a GPU
        "megatron-core>=0.16.1,<0.20",  # the base, up to Python 3.11 the only one; docs/running.md names what was tried
        'triton>=3.6; python_version >= "3.12" and sys_platform == "linux"',  # megatron-core imports it from 0.18 on, and does not say so
        "transformers>=5",
        "regex",
        "safetensors",
        "sentencepiece",
        "rouge-score",
        "numpy",
        "pyyaml",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "psutil",  # megatron-core's checkpoints hang without it
        "tyro>=0.9",
    ],
    extras_require={
        "real": ["gguf"],  # scripts/get_model.py
        "benchmark": ["trl>=1.16", "liger-kernel"],  # scripts/benchmark_systems.py
        "wandb": ["wandb"],  # --wandb-project
        "vllm": ["vllm>=0.33"],  # --rollout-engine
        "quantize": ["torchao>=0.15"],  # --teacher-quantize
        "gpu": ["triton>=3.6", "flash-attn"],  # torch pins its own Triton; tests interpret kernels, which takes 3.7 beside NumPy 2.4
        "flash4": ["flash-attn-4>=4.0.0b9"],  # Hopper and Blackwell; there are betas alone so far
        "test": ["gguf", "hypothesis", "peft", "pytest", "pytest-xdist", "ruff", "triton>=3.7", "pyarrow", "torchao>=0.15"],
    },
)
