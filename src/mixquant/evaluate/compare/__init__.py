"""`mixquant compare`: one conversation in three arms."""
