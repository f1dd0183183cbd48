"""Flower's processes: started, watched and ended."""
