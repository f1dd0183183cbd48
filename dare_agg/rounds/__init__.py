"""A federated round without a network: plans, the client's half, the server's half, the step."""
