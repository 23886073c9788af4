"""vLLM servers as processes of this machine."""
