"""Instruction data: conversations, the model's chat template over them, and answers generated."""
