"""Flower's own examples beside their form with the two changed lines, on packaged data."""
