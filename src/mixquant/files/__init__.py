"""Reading files of others, and writing files of our own."""
