"""Models whose hidden numbers reach the data through a network."""
