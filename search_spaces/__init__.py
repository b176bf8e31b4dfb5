"""Search spaces and named strategies, as YAML data without code."""
