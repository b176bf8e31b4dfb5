"""Programs that keep documents up to date: the README's translation, generated references, the site."""
