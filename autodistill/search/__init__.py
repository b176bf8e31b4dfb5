"""The search: proposes, schedules, runs and finishes trials within a memory budget and a time budget."""
