"""Speed: the training step, inference and the input, timed; see `__main__`."""
