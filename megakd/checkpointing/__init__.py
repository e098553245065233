"""Native checkpoints: save and load a run at any TP x PP x DP, and convert from and to Hugging Face folders."""
