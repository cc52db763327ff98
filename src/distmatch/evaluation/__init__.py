"""Figures of a model: distances in feature spaces, precision and recall, accuracy, speed."""
