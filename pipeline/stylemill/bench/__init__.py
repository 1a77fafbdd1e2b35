"""What the engine does on a device: models with random weights, and what measures them."""
