"""The way back: the global model as versions, and the small steps between them."""
