"""What a run needs, worked out before it starts: cost, memory, and checks that everything is there."""
