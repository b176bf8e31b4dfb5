"""One search for several budgets: what they share is made once, and each budget that differs has a run of its own."""
