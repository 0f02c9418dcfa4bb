"""Many trainings of one project: over freeze levels, numbers of images, seeds and parameters.

In: a project whose images are read and split. Out: a record, a DVC experiment and an MLflow run of
each cell, a table and a picture.
"""
