"""What a trained network looks at: heat maps, channels, neighbours, a map of the images."""
