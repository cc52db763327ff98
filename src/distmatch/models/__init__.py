"""Networks and teachers."""
