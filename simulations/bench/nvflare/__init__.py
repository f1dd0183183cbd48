"""NVFlare's FedAvg beside DARE in NVFlare: bytes, memory and accuracy of whole jobs."""
