"""Adversarial attacks: one file an attack, each a value called (model, x, y, generator=...)."""
