"""One pipeline stage per rank of a GPT-2, OPT, Llama, Qwen2 or Mistral model, read from an ordinary Hugging Face folder."""
