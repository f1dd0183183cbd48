"""Named tensors as one flat vector, and the model as three groups of them."""
