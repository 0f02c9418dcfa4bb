"""Evaluation: the bundle, measured on the test split through the predictor that serves it.

In: bundle, pixels, split table. Out: the report, every prediction, plots, example images.
Stage: ``evaluate``.
"""
