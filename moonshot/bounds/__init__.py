"""What no answer can beat: branch and bound on small rows, a relaxation on all others."""
