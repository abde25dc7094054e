"""The one weight loop and the training methods, one file a method."""
