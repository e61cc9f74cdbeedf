"""What the notebooks show and nobody else needs."""
