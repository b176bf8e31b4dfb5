"""Which strategy to try next, and which trial to stop, pause or continue."""
