"""Programs that measure the figures that the project reports, in folders by question."""
