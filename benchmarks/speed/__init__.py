"""How fast the solvers are: against their peers, the products they cannot avoid, and themselves as they were."""
