"""Native arithmetic of cells on the CPU: compiled once at first use, for the processor at hand."""
