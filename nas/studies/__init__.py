"""Width/depth studies: what many trained architectures say about the shape of robust networks."""
