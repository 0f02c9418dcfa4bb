"""What answers: bytes of an image in, labels with probabilities out. No torch.

In: a bundle. Out: predictions. Command: ``predict``.
"""
