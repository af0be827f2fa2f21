"""Label-free recovery: a reduced model learns to answer as the dense one does."""
