"""The search against simpler approaches, in equal time. Arms, blocks and targets are in `blocks.yaml`."""
