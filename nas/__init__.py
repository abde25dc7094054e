"""The engine: how an architecture is searched, trained, shrunk, attacked, measured and exported."""
