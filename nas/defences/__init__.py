"""Defences that are built around a trained network."""
