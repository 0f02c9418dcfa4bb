"""What is learned: a classifier on top of the frozen part.

In: activations and the split table. Out: the model (safetensors and JSON) and its history.
Stage: ``train``.
"""
