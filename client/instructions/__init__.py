"""Instruction data: conversations, templates, packing, generation."""
