"""Everything that works on checkpoints without a federation: recipes, merges, diffs, diagnosis."""
