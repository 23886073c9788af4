"""`mixquant compare`: one conversation in a few arms."""
