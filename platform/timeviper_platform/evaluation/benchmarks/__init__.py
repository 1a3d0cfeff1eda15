"""Published benchmarks in their owners' layouts, to questions."""
