"""What a run leaves on disk: its folder, log, students, checkpoints and report."""
