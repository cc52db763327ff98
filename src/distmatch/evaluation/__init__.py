"""Measures models: distances in feature spaces, precision and recall, accuracy, speed."""
