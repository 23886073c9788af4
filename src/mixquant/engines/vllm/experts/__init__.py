"""Layers of experts (MoE) in vLLM."""
