"""Helpers that know nothing of models: JSON and YAML files, event log, locks, hashes, storage, timeouts."""
