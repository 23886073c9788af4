"""Every place where vLLM is changed."""
