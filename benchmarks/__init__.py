"""How fast and how large a step of RoseFusedAdamW is, next to other optimizers: see README.md."""
