"""`mixquant evaluate`: benchmarks in several arms."""
