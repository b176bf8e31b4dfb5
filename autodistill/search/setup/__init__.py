"""The steps before the first trial: teacher and data are loaded, and the machine is measured."""
