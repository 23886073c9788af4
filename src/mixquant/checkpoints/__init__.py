"""Models on disk: found, read and written."""
