"""Speed and scale, measured as ratios against a baseline; ``results/`` holds what was measured, with its command."""
