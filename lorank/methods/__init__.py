"""Methods that change what the weights are: one paper, one file."""
