"""LoRA adapters on a pretrained model: which modules get them, how, and what a node learns."""
