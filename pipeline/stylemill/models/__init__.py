"""Which files a model, ControlNet or LoRA consists of, and whether it is supported. Does not import torch."""
