"""Optimizers, one rule a file, over any parameters: they know nothing of models, Trainer, files or the command line."""
