"""What the images are: from a source's files to a manifest, pixels and splits.

In: the candidates of a source. Out: the manifest, the rejected files with their reasons, the pixels
decoded once, the split table. Stages: ``ingest``, ``split``.
"""
