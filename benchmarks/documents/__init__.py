"""Programs that keep pages true: the translation of the README, generated references, the site."""
