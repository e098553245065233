"""Native checkpoints: save and load a run at any TP x PP x DP, and convert from and to Hugging Face folders."""

from megakd.checkpointing.export_hf import export_to_hf
from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.native import NativeCheckpoint, read_latest
from megakd.checkpointing.training import load_checkpoint, save_checkpoint

__all__ = ["ModelFolder", "NativeCheckpoint", "export_to_hf", "load_checkpoint", "read_latest", "save_checkpoint"]
