"""A FedAvg app in the manner of the PyTorch tutorial."""
