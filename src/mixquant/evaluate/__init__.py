"""Fidelity and speed on real workloads, arms side by side."""
