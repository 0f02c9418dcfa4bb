"""What ships: one ONNX graph from pixels to probabilities, and the bundle that it travels in.

In: the model. Out: the bundle, the parity report. Stage: ``export``.
"""
