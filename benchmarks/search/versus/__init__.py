"""The search beside everyone who does less, in equal time: arms, blocks and targets are in `blocks.yaml`."""
