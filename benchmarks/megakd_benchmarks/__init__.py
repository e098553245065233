"""What only measures: one PromptKD iteration taken apart, and beside the same on transformers and PEFT; in `operators`, each kernel."""
