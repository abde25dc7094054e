"""What an architecture looks like and costs: topology, complexity, pictures."""
