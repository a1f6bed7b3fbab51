"""One layer as a pruning problem: objectives, patterns, the problem they make and the result it has."""
