"""The field's own files: boxes and tracks in five formats, and still images with instances for training."""
