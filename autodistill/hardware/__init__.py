"""Machines, devices, and the limits of memory and latency that they set."""
