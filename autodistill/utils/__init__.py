"""Helpers that are independent of models: JSON and YAML files, event log, locks, hashes, storage, timeouts."""
