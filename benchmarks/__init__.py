"""Programs that measure what the project says of itself, in folders by question."""
