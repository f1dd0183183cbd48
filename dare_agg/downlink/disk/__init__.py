"""What of a version lies on disk: vectors of the model's size in files, and how they change."""
