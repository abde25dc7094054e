"""What can be built: genotypes, candidate operations, cells, layouts, networks and supernets."""
