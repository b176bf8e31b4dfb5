"""What a search will spend: trials, tokens, workers, memory and time."""
