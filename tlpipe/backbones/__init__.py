"""What the backbone sees: the frozen part of a pretrained network, computed once per image.

In: pixels. Out: the activations at the freeze boundary. Stage: ``embed``.
"""
