"""What a run takes before it starts: cost, memory, and whether all that it needs is there."""
