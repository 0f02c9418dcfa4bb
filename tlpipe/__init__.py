"""Point it at labelled images; get a classifier that is reproducible, measured and served."""
