"""What a student is trained on: divergences, targets, alignments, and how they change over tokens."""
