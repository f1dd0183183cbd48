"""The client side of the Flower app: data, tasks, training."""
