"""Networks, families of teachers, and model folders."""
