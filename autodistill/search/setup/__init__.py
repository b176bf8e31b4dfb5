"""What stands before the first trial: teacher and data loaded, the machine measured."""
