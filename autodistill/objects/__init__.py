"""What the Python API returns: runs, their students, and answers."""
