"""Differentiable architecture search: relaxation, architecture gradient, min-norm step, bilevel loop, monitor."""
