"""Lower bounds of what any answer can reach: branch and bound on small rows, a relaxation on all others."""
