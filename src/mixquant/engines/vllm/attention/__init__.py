"""Attention in FP8 over vLLM's BF16 KV cache."""
