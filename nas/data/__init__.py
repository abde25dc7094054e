"""Images and labels: built-in sets, torchvision sets, .npz arrays and folders; splitting, batching, augmentation.

A module with an attribute ``PLUGIN`` is a data set: a frozen dataclass whose instances, called without
arguments, return an ``ImageData``.
"""
