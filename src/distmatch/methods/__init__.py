"""The training methods: Algorithm 1 with its streams and terms, and the teacher's objective."""
