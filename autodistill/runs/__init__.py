"""The records of a run on disk: its folder, log, students, checkpoints and report."""
