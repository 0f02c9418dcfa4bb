"""What the images are: from a source to a manifest, pixels and splits.

In: a folder of labelled images, or a built-in data set. Out: the manifest, the rejected files with
their reasons, the pixels decoded once, the split table. Stages: ``ingest``, ``split``.
"""
