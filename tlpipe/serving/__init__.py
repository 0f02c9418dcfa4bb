"""What answers the world: the predictor behind HTTP. No torch, no MLflow.

In: a bundle. Out: answers at ``POST /predict``. Command: ``serve``.
"""
