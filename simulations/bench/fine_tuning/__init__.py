"""Full fine-tuning of the largest real model here, through SuperLink and SuperNodes."""
