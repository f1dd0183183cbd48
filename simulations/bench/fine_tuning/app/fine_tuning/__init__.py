"""Full fine-tuning of a causal language model that lies on every disk."""
