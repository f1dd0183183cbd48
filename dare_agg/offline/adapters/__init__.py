"""Adapters as deltas: what PEFT's ``merge_and_unload`` would add to the base, formed block by
block from the adapter's factors, or a true word on why it cannot be."""
