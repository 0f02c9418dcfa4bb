"""What is promoted: bundles as versions of an MLflow model.

In: bundle, parity, report, plots, history, data report. Out: a run, a model version and a receipt.
Stage: ``register``.
"""
