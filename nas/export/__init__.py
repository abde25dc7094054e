"""Architectures and trained networks in forms that stand alone, each reloaded and compared."""
