"""A model sent down and up without training, by NVFlare and by Flower's FedAvg."""
