"""mergekit's files: read as they are, said in this project's own recipe, merged by it."""
