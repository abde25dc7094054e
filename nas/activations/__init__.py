"""Activations: what stands where a network has its ReLUs, part of the network's description. One file each."""
