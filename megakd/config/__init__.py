"""Every setting of a run: one field is one flag, with its help and its check. A YAML file lies under the flags; flags win.

Flag names are Megatron's where Megatron has one, then Hugging Face's, then PromptKD's own. Importing this room imports no torch,
so that `--help` answers at once.
"""

from megakd.config.answering import AnsweringConfig
from megakd.config.attention import AttentionConfig
from megakd.config.base import BaseConfig
from megakd.config.benchmark import BenchmarkConfig, SystemsConfig
from megakd.config.cache import CacheConfig
from megakd.config.conditioning import ConditioningConfig
from megakd.config.distillation import DistillationConfig
from megakd.config.evaluate import EvaluateConfig
from megakd.config.fields import alike, flag_name
from megakd.config.generate import GenerateConfig
from megakd.config.lora import LoRAConfig
from megakd.config.methods.base import MethodConfig
from megakd.config.methods.distillm import DistiLLMConfig
from megakd.config.methods.kd import KDConfig
from megakd.config.methods.minillm import MiniLLMConfig
from megakd.config.methods.promptkd import PromptKDConfig
from megakd.config.methods.response_priming import ResponsePrimingConfig
from megakd.config.models import SELF, ModelConfig
from megakd.config.output import OutputConfig
from megakd.config.parallel import LayoutConfig, ParallelConfig, TeacherLayoutConfig, TeacherParallelConfig
from megakd.config.parse import AnyConfig, from_flags, from_values, from_yaml, parse
from megakd.config.sampling import GenerationConfig, ResponseConfig, SamplingConfig
from megakd.config.scores import ScoreConfig, SelectionConfig
from megakd.config.teacher import TeacherConfig
from megakd.config.train import METHODS, Config, DataConfig
from megakd.config.training import TrainingConfig

__all__ = [
    "METHODS", "SELF", "AnsweringConfig", "AnyConfig", "AttentionConfig", "BaseConfig", "BenchmarkConfig", "CacheConfig",
    "ConditioningConfig", "Config", "DataConfig", "DistiLLMConfig", "DistillationConfig", "EvaluateConfig", "GenerateConfig",
    "GenerationConfig", "KDConfig", "LayoutConfig", "LoRAConfig", "MethodConfig", "MiniLLMConfig", "ModelConfig",
    "OutputConfig", "ParallelConfig", "PromptKDConfig", "ResponseConfig", "ResponsePrimingConfig", "SamplingConfig",
    "ScoreConfig", "SelectionConfig", "SystemsConfig", "TeacherConfig", "TeacherLayoutConfig", "TeacherParallelConfig", "TrainingConfig",
    "alike", "flag_name", "from_flags", "from_values", "from_yaml", "parse",
]  # fmt: skip
