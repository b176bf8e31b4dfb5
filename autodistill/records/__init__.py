"""What a search leaves behind: events, rows, the leaderboard and its pages."""
