"""One pipeline stage per rank of a GPT-2, OPT or Llama model, read from an ordinary Hugging Face folder."""
