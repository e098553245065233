"""Native checkpoints: save and load a run at any TP x PP x DP, and convert from and to Hugging Face folders."""

from megakd.checkpointing.native import NativeCheckpoint, is_native, read_latest
from megakd.checkpointing.training import load_checkpoint, save_checkpoint
from megakd.checkpointing.weights import hf_config_of, hf_folder_of, load_model_weights, open_weights

__all__ = [
    "NativeCheckpoint",
    "hf_config_of",
    "hf_folder_of",
    "is_native",
    "load_checkpoint",
    "load_model_weights",
    "open_weights",
    "read_latest",
    "save_checkpoint",
]
