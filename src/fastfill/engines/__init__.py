"""What runs the model: `transformers` (here). One module per engine."""
