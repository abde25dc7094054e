"""Accuracy under attack with its interval, and the checks that make the evaluator suspect itself."""
