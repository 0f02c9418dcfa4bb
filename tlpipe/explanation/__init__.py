"""What a trained network looks at: heat maps, channels, neighbours, a map of the images."""

FOLDER = "artifacts/explain"
BUNDLE = "explain.json"  # in there: the digest of the bundle that is explained
