"""mergekit's files merged by mergekit and by dare-agg, compared tensor by tensor."""
