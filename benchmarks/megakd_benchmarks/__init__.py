"""One PromptKD iteration measured: taken apart, and beside the same iteration on transformers and PEFT."""
