"""Running a host sparsely: positions, sessions, the sparsify context, generation."""
