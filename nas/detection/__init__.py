"""Detectors of adversarial images, and the attacks that know them."""
