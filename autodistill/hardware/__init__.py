"""Machines, devices, and the memory and latency limits that they set."""
