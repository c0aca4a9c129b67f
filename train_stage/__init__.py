"""Stage two: trains a LLaVA-style model that also predicts each image's codes, read from a manifest."""
