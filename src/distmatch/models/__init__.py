"""Networks, the families of teachers, and model folders."""
