"""Speed: time to first token and per output token, throughput, of several arms side by side."""
