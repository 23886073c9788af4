"""`mixquant fidelity`: how far arms are from BF16 on the same texts."""
