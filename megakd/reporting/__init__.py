"""What a run tells: the progress line, metrics.jsonl, TensorBoard, samples and figures."""
