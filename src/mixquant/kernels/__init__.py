"""Fused kernels: what would cost a pass over memory of its own goes into one with its neighbours."""
