"""How runs are kept: identity, folders, processes side by side, the workers of a cluster."""
