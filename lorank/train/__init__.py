"""Training on transformers.Trainer: from a recipe and text to a model."""
