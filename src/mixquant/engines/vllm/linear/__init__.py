"""Linear layers in vLLM."""
