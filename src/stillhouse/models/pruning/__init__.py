"""Starting a student from parts of its teacher: which layers, channels, heads and tokens, and the cut."""
